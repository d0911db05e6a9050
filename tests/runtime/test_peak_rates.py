"""What a machine can do at most, by measurement and by page; and what phases took."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.config import hardware_page
from harness.config.compose import groups
from harness.config.settings import Model
from harness.ledger import Ledger
from harness.ledger.events import Where
from harness.ledger.timer import Times
from harness.model.loader import sizes
from harness.record import ceilings, phase_times
from harness.record.results import Ceilings, Took
from harness.runtime import peak_rates

RATED = sorted(set(groups()["hardware"]) - {"auto", "cpu"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_dtype_that_runs_has_both_rates(dtype: torch.dtype) -> None:
    bandwidth, flops = peak_rates.measure(torch.device("cpu"), dtype)
    assert bandwidth is not None
    assert bandwidth > 0
    assert flops is not None
    assert flops > 0


def test_the_slowest_rank_is_the_ceiling_and_one_that_could_not_measure_leaves_none() -> None:
    reported = ceilings.of_ranks([(3.0, 70.0), (2.0, 80.0)], "bfloat16")
    assert reported == Ceilings(source="measured", bandwidth=2.0, flops=70.0, dtype="bfloat16")
    assert ceilings.of_ranks([(3.0, None), (2.0, 80.0)], "float32").flops is None


def test_what_cannot_be_tried_is_not_measured() -> None:
    bandwidth, flops = peak_rates.measure(torch.device("cpu"), torch.uint16)  # has no matrix product
    assert bandwidth is not None
    assert flops is None


@pytest.mark.parametrize("name", RATED)
def test_a_page_gives_its_dense_rate_and_keeps_the_others_apart(name: str) -> None:
    hardware = hardware_page.named(name)
    reported = ceilings.of_page(hardware, "bfloat16")
    assert reported is not None
    assert (reported.source, reported.flops) == (name, hardware.flops_bf16)
    assert (hardware.flops_bf16 is None) == (hardware.flops_bf16_sparse is None)
    if hardware.flops_bf16 is not None:
        assert hardware.flops_bf16_sparse == pytest.approx(
            2 * hardware.flops_bf16, rel=0.02
        )  # as vendors round


def test_a_page_has_no_rate_of_what_it_does_not_say() -> None:
    reported = ceilings.of_page(hardware_page.named("h100-sxm"), "float32")
    assert reported == Ceilings(source="h100-sxm", bandwidth=3.35e12, flops=None, dtype="float32")
    assert hardware_page.named("rtx4090").flops_fp16_accumulate == 3.303e14


@pytest.mark.parametrize("name", ["h1000", "cpu", "auto", "../model/tiny"])
def test_a_page_without_rates_is_refused_with_those_that_have_them(name: str) -> None:
    with pytest.raises(ValueError, match=f"hardware={name}: no page with rates .* one of a100-40gb, .*l40s"):
        hardware_page.named(name)


def test_a_phase_s_seconds_are_the_median_step_of_the_slowest_rank() -> None:
    taken = [
        {"forward": {0: 9.0, 1: 1.0, 2: 3.0, 3: 2.0}},
        {"forward": {0: 9.0, 1: 4.0, 2: 6.0, 3: 5.0}, "only": {0: 7.0}},
    ]
    assert phase_times.of_ranks(taken, "off") == [
        Took(phase="forward", seconds=5.0, steps=3, rank=1),
        Took(phase="only", seconds=7.0, steps=1, rank=1),
    ]
    assert phase_times.of_ranks([{"forward": {3: 2.0, 4: 4.0}}], "exact") == [
        Took(phase="forward", seconds=3.0, steps=2, rank=0)
    ]
    assert phase_times.of_ranks([{}, {}], "exact") is None


def test_phases_are_timed_once_the_exact_ledger_lets_go() -> None:
    with Ledger(device="cpu", steps=2) as ledger:
        for step in range(4):
            for micro_batch in range(3):
                with ledger.phase("forward", step, micro_batch):
                    torch.ones(3)
    assert {name: list(steps) for name, steps in ledger.seconds().items()} == {"forward": [2, 3]}
    assert all(seconds > 0 for seconds in ledger.seconds()["forward"].values())


def test_seconds_of_a_gpu_are_read_when_it_has_come_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events stand in for a GPU's: what is under test is when they are asked."""
    now = iter(range(100))

    class Event:
        ready = False

        def __init__(self, enable_timing: bool) -> None:
            self.at = next(now)

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return self.ready

        def elapsed_time(self, other: "Event") -> float:
            assert self.ready
            return 1000.0 * (other.at - self.at)

    def synchronize() -> None:
        Event.ready = True

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Event, synchronize=synchronize))
    times = Times(gpu=True)
    for micro_batch in range(2):
        times.add(Where(4, "forward", micro_batch), times.moment())
    assert times.by_phase() == {"forward": {4: 2.0}}


def test_embeddings_are_tables_that_nothing_is_multiplied_by() -> None:
    table, head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
    model: Any = torch.nn.Sequential(table, head)
    counted = sizes(Model(name="two"), model, torch.float32)
    assert (counted.parameters, counted.embeddings) == (80, 40)
    head.weight = table.weight
    counted = sizes(Model(name="two"), model, torch.float32)
    assert (counted.parameters, counted.embeddings) == (40, 0)
