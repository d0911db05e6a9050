"""The figures of the last step, while the ledger is open: those of its account, for less."""

import sys
from types import FrameType
from typing import Any

import torch

from harness import Ledger
from harness.ledger import CATEGORIES


def a_step(ledger: Ledger, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    with ledger.phase("data", step):
        batch = torch.randn(2 + step, 64)
        ledger.claim("inputs", "batch", batch)
    with ledger.phase("forward", step):
        loss = model(batch).square().mean()
    with ledger.phase("backward", step):
        loss.backward()
    with ledger.phase("step", step):
        optimizer.step()
        optimizer.zero_grad()


def trained(steps: int = 4) -> tuple[Ledger, torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    return Ledger(model=model, optimizer=optimizer, steps=steps), model, optimizer


def test_each_stretch_has_the_peak_that_the_account_has_of_its_step() -> None:
    ledger, model, optimizer = trained()
    with ledger:
        for step in range(4):
            a_step(ledger, model, optimizer, step)
            stretch = ledger.recent.take()
            phases = [phase for phase in ledger.account().phases if phase.where.step == step]
            phases = [phase for phase in phases if phase.where.phase != "idle"]
            highest = max(phases, key=lambda phase: phase.peak or 0)
            assert stretch.bytes == highest.peak
            assert stretch.at_peak == {name: highest.categories[name] for name in CATEGORIES}
            for name in CATEGORIES:
                assert stretch.peaks[name] >= max(phase.categories[name] or 0 for phase in phases)
            assert ledger.highest() == ledger.account().peak.bytes  # type: ignore[union-attr]
        own = {name: each.peak for name, each in ledger.account().categories.items()}
    assert own["optimizer"] == stretch.peaks["optimizer"] > 0
    assert own["inputs"] == stretch.peaks["inputs"] == 5 * 64 * 4


def test_what_was_looked_at_is_still_there_to_take() -> None:
    ledger, model, optimizer = trained()
    with ledger:
        a_step(ledger, model, optimizer, 0)
        before = ledger.highest()
        a_step(ledger, model, optimizer, 1)
        stretch = ledger.recent.take()
        assert stretch.bytes == max(before or 0, ledger.highest() or 0)
        assert stretch.peaks["optimizer"] == ledger.account().categories["optimizer"].peak
        empty = ledger.recent.take()  # nothing happened: what is alive now
        assert empty.bytes == sum(empty.at_peak.values()) < (stretch.bytes or 0)


def test_after_the_exact_steps_only_what_owners_had_is_known() -> None:
    ledger, model, optimizer = trained(steps=1)
    with ledger:
        a_step(ledger, model, optimizer, 0)
        assert ledger.recent.take().owned == {}
        a_step(ledger, model, optimizer, 1)
        stretch = ledger.recent.take()
    sizes = sum(parameter.nbytes for parameter in model.parameters())
    assert (stretch.bytes, stretch.at_peak, stretch.peaks) == (None, {}, {})
    assert stretch.owned["parameters"] == stretch.owned["gradients"] == sizes
    assert "activations" not in stretch.owned
    assert ledger.highest() == ledger.peak.bytes
    assert ledger.recent.take().owned == {}


def test_a_storage_that_is_named_late_counts_from_the_beginning() -> None:
    early = torch.randn(1000)
    with Ledger() as ledger:
        torch.zeros(10)
        ledger.claim("kv_cache", "early", early)
        stretch = ledger.recent.take()
        account = ledger.account()
    assert stretch.peaks["kv_cache"] == 4000
    assert account.peak is not None
    assert stretch.bytes == account.peak.bytes


def test_a_ledger_that_is_not_exact_knows_no_peak() -> None:
    with Ledger(mode="phases") as ledger:
        torch.zeros(10)
    assert ledger.highest() is None
    assert ledger.recent.take().bytes is None


def taken_while_freed(instruction: int) -> tuple[int | None, int | None]:
    """The peaks of two stretches, if the only storage is freed at an instruction of the first look, as by a thread."""
    garbage: list[torch.Tensor] = []
    left = instruction

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if not left:
            garbage.clear()
        return trace

    with Ledger(allocator=False) as ledger:
        garbage.append(torch.zeros(1000))
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            first = ledger.recent.take()
        finally:
            sys.settrace(before)
        return first.bytes, ledger.recent.take().bytes


def test_a_storage_that_is_freed_in_the_middle_of_a_look_counts_once() -> None:
    seen = {taken_while_freed(instruction) for instruction in range(1, 121, 3)}
    assert seen == {(4000, 0), (4000, 4000)}
