"""What is counted to move, against what was given to the process group, written out by hand."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.ledger import Ledger, Where
from harness.ledger.traffic import READ, Amounts, Moved
from harness.ledger.unseen import NotSeen

RANKS, F32 = 4, 4
WORLD = tuple(range(RANKS))


@pytest.fixture
def world() -> Iterator[None]:
    """A world of four, of which this process is rank 1."""
    dist.init_process_group("fake", rank=1, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def coalesced() -> None:
    manager: Any = vars(dist.distributed_c10d)["_coalescing_manager"]
    with manager():
        for _ in range(3):
            dist.all_reduce(ones(5))


def batched() -> None:
    operations = [dist.P2POp(dist.isend, ones(6), 3), dist.P2POp(dist.irecv, ones(6), 0)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def in_subgroup() -> None:
    dist.all_reduce(ones(8), group=dist.new_group([1, 3]))


def of_dtensor() -> None:
    mesh = DeviceMesh("cpu", torch.arange(RANKS))
    DTensor.from_local(ones(2, 2), mesh, [Shard(0)]).redistribute(placements=[Replicate()])


CALLS: dict[str, tuple[Callable[[], object], list[tuple[str, tuple[int, ...], int, int]]]] = {
    "all_reduce": (lambda: dist.all_reduce(ones(5, 3)), [("all-reduce", WORLD, 1, 60)]),
    "broadcast": (lambda: dist.broadcast(ones(7), 0), [("broadcast", WORLD, 1, 28)]),
    "reduce": (lambda: dist.reduce(ones(7), 2), [("reduce", WORLD, 1, 28)]),
    "all_gather": (
        lambda: dist.all_gather([ones(2) for _ in WORLD], ones(2)),
        [("all-gather", WORLD, 1, RANKS * 2 * F32)],
    ),
    "all_gather_into_tensor": (
        lambda: dist.all_gather_into_tensor(ones(8), ones(2)),
        [("all-gather", WORLD, 1, RANKS * 2 * F32)],
    ),
    "reduce_scatter_tensor": (
        lambda: dist.reduce_scatter_tensor(ones(2), ones(8)),
        [("reduce-scatter", WORLD, 1, RANKS * 2 * F32)],
    ),
    "reduce_scatter": (
        lambda: dist.reduce_scatter(ones(2), [ones(2) for _ in WORLD]),
        [("reduce-scatter", WORLD, 1, RANKS * 2 * F32)],
    ),
    "all_to_all_single": (
        lambda: dist.all_to_all_single(ones(8), ones(8)),
        [("all-to-all", WORLD, 1, 8 * F32)],
    ),
    "all_to_all": (
        lambda: dist.all_to_all([ones(2) for _ in WORLD], [ones(2) for _ in WORLD]),
        [("all-to-all", WORLD, 1, 8 * F32)],
    ),
    "gather": (lambda: dist.gather(ones(3), None, 0), [("gather", WORLD, 1, RANKS * 3 * F32)]),
    "scatter": (lambda: dist.scatter(ones(3), None, 0), [("scatter", WORLD, 1, RANKS * 3 * F32)]),
    "send": (lambda: dist.send(ones(6), 3), [("send", (1, 3), 1, 24)]),
    "recv": (lambda: dist.recv(ones(6), 0), [("receive", (0, 1), 1, 24)]),
    "batched": (batched, [("receive", (0, 1), 1, 24), ("send", (1, 3), 1, 24)]),
    "in half precision": (lambda: dist.all_reduce(ones(5).half()), [("all-reduce", WORLD, 1, 10)]),
    "of a subgroup": (in_subgroup, [("all-reduce", (1, 3), 1, 32)]),
    "of a DTensor": (of_dtensor, [("all-gather", WORLD, 1, 64)]),
    "a barrier": (dist.barrier, []),
    "an empty tensor": (lambda: dist.all_reduce(torch.empty(0)), []),
}


def moved(ledger: Ledger, phase: str = "act") -> list[tuple[str, tuple[int, ...], int, int]]:
    """Operation, ranks, calls and bytes of what moved in `phase`, whatever it was for."""
    amounts = next((each for where, each in ledger.traffic.amounts().items() if where.phase == phase), {})
    return sorted((kind.operation, kind.ranks, *figures) for kind, figures in amounts.items())


@pytest.mark.parametrize("name", CALLS)
def test_a_transfer_has_the_bytes_that_the_group_was_given(world: None, name: str) -> None:
    call, expected = CALLS[name]
    with Ledger(device="cpu") as ledger, ledger.phase("act"):
        call()
    assert moved(ledger) == expected


@pytest.mark.parametrize("name", [name for name in CALLS if name != "of a DTensor"])
def test_a_ledger_that_sums_owners_counts_the_same(world: None, name: str) -> None:
    call, expected = CALLS[name]
    with Ledger(device="cpu", mode="phases") as ledger, ledger.phase("act"):
        call()
    assert moved(ledger) == expected


def test_what_dtensor_sends_is_missing_aloud_without_a_log(world: None) -> None:
    with warnings.catch_warnings(), Ledger(device="cpu", mode="phases") as ledger:
        warnings.simplefilter("ignore", NotSeen)
        of_dtensor()
    assert [gap.figures for gap in ledger.gaps] == ["traffic"]


def test_calls_that_are_coalesced_count_each(world: None) -> None:
    with Ledger(device="cpu") as ledger, ledger.phase("act"):
        coalesced()
    assert sum(nbytes for *_, nbytes in moved(ledger)) == 3 * 5 * F32


def test_a_transfer_is_for_the_owner_of_its_tensor_or_the_module_that_runs(world: None) -> None:
    class Reduced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(ones(3))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            sums = rows * self.weight
            dist.all_reduce(sums)
            return sums

    model = torch.nn.Sequential(Reduced())
    with Ledger(model, device="cpu") as ledger:
        with ledger.phase("forward"), torch.no_grad():
            model(ones(2, 3))
        with ledger.phase("act"):
            dist.broadcast(model.get_parameter("0.weight").data, 0)
    amounts = ledger.traffic.amounts()
    assert amounts[Where(0, "forward", 0)] == {Moved("all-reduce", WORLD, "0"): (1, 24)}
    assert amounts[Where(0, "act", 0)] == {Moved("broadcast", WORLD, "0.weight"): (1, 12)}


def test_without_a_log_it_is_not_known_what_a_transfer_was_for(world: None) -> None:
    with Ledger(device="cpu", mode="phases") as ledger, ledger.phase("act"):
        dist.all_reduce(ones(3))
    assert ledger.traffic.amounts()[Where(0, "act", 0)] == {Moved("all-reduce", WORLD, None): (1, 12)}


def test_a_phase_that_moves_what_it_did_before_is_kept_once(world: None) -> None:
    with Ledger(device="cpu", mode="phases") as ledger:
        for step, elements in enumerate((3, 3, 4, 4)):
            with ledger.phase("act", step):
                dist.all_reduce(ones(elements))
    sums = {where.step: sum(nbytes for _, nbytes in each.values()) for where, each in amounts_of(ledger)}
    assert sums == {0: 12, 2: 16}


def amounts_of(ledger: Ledger) -> list[tuple[Where, Amounts]]:
    return [(where, amounts) for where, amounts in ledger.traffic.amounts().items() if amounts]


def test_what_is_not_to_count_does_not(world: None) -> None:
    with Ledger(device="cpu") as ledger, ledger.phase("act"):
        with ledger.uncounted():
            dist.all_reduce(ones(3))
            ledger.traffic.report(READ, {"rows": 8})
        with Ledger(device="cpu", mode="off") as off:
            dist.all_reduce(ones(4))
    assert moved(ledger) == [("all-reduce", WORLD, 1, 16)]
    assert not amounts_of(off)


def test_a_read_has_the_bytes_that_the_program_reports() -> None:
    with Ledger(device="cpu") as ledger, ledger.phase("act"):
        ledger.traffic.report(READ, {"weights/a": 12, "weights/b": 1})
        ledger.traffic.report(READ, {})
    assert ledger.traffic.amounts()[Where(0, "act", 0)] == {
        Moved(READ, (), "weights/a"): (1, 12),
        Moved(READ, (), "weights/b"): (0, 1),
    }


def test_what_a_group_cannot_be_asked_is_a_gap_and_no_error(world: None) -> None:
    method = dist.ProcessGroup.allreduce
    group: Any = dist.group.WORLD
    with warnings.catch_warnings(), Ledger(device="cpu") as ledger:
        warnings.simplefilter("ignore", NotSeen)
        assert dist.ProcessGroup.allreduce is not method
        with pytest.raises(TypeError):
            group.allreduce()
    assert dist.ProcessGroup.allreduce is method
    assert [gap.figures for gap in ledger.gaps] == ["traffic"]
