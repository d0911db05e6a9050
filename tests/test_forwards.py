"""Forwards wait for their backward as long as autograd keeps what they saved; in inference there are none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harness import Ledger
from harness.ledger.forwards import Forwards

Schedule = list[tuple[str, int]]
ONE_AT_A_TIME: Schedule = [("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1)]
TWO_AT_ONCE: Schedule = [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)]
ONE_AHEAD: Schedule = [
    *[("forward", 0), ("forward", 1), ("backward", 0), ("forward", 2)],
    *[("backward", 1), ("backward", 2)],
]
ROWS = (3, 5, 7)
"""Of each micro-batch, so that what it saves has a size of its own."""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8), nn.Softmax(dim=-1))


def saved_by(model: nn.Module, given: Tensor) -> int:
    """Bytes that autograd keeps of a forward, parameters and what was given apart, as its own hooks tell."""
    storages: dict[int, Tensor] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), given)}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(given)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in storages.items() if place not in known)


def followed(
    schedule: Schedule, mode: str = "exact", steps: int = 1, keep: Callable[[Tensor], None] | None = None
) -> tuple[Forwards | None, nn.Module]:
    """The forwards that a ledger saw while `schedule` was followed."""
    model = network()
    with Ledger(model=model, mode=mode) as ledger:
        for step in range(steps):
            waiting: dict[int, Tensor] = {}
            for phase, number in schedule:
                with ledger.phase("data", step, number):
                    given = torch.ones(ROWS[number], 16)
                with ledger.phase(phase, step, number):
                    if phase == "forward":
                        waiting[number] = model(given)
                        if keep is not None:
                            keep(waiting[number])
                    elif phase == "backward":
                        waiting.pop(number).sum().backward()
                    else:
                        with torch.no_grad():
                            model(given)
    return ledger.forwards, model


@pytest.mark.parametrize(
    ("schedule", "alive"), [(ONE_AT_A_TIME, (1,)), (TWO_AT_ONCE, (0, 1)), (ONE_AHEAD, (1, 2))]
)
@pytest.mark.parametrize("steps", [1, 2])
def test_as_many_are_alive_as_the_schedule_has_waiting_with_the_bytes_autograd_saved(
    schedule: Schedule, alive: tuple[int, ...], steps: int
) -> None:
    found, model = followed(schedule, steps=steps)
    assert found is not None
    assert found.alive == len(alive)
    assert found.stashes == tuple(saved_by(model, torch.ones(ROWS[number], 16)) for number in alive)
    assert found.where is not None
    assert found.where.phase == "forward"
    assert found.where.micro_batch == alive[-1]


def test_inference_has_none() -> None:
    found, _ = followed([("prefill", 0), ("decode", 0), ("decode", 1)])
    assert found == Forwards(0, (), None)


def test_a_forward_without_gradients_has_none_between_those_with_them() -> None:
    found, _ = followed([("forward", 0), ("validate", 1), ("backward", 0)])
    assert found is not None
    assert found.alive == 1


def test_what_outlives_its_backward_waits_for_nothing() -> None:
    kept: list[Tensor] = []
    found, _ = followed(ONE_AT_A_TIME, keep=kept.append)  # softmax saves its output
    assert len(kept) == 2
    assert found is not None
    assert found.alive == 1


def test_they_are_not_measured_where_only_phases_are() -> None:
    found, _ = followed(TWO_AT_ONCE, mode="phases")
    assert found is None
