"""What is counted to move, against what was given to the process group, written out by hand."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.analysis.moves.transfers import of_last
from harness.ledger import Ledger, Where
from harness.ledger.traffic import MOST_STEPS, NOTHING, READ, Amounts, Moved
from harness.ledger.unseen import NotSeen
from harness.record.links import Nodes
from harness.record.record_file import rank_record

RANKS, F32 = 4, 4
WORLD = tuple(range(RANKS))


@pytest.fixture
def world() -> Iterator[None]:
    """A world of four, of which this process is rank 1."""
    dist.init_process_group("fake", rank=1, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def everybody() -> Any:
    """The group of all ranks."""
    return vars(dist.distributed_c10d)["_get_default_group"]()


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


class Sharded(torch.nn.Module):
    """A module whose parameter is shared by all ranks."""

    def __init__(self) -> None:
        super().__init__()
        mesh = DeviceMesh("cpu", torch.arange(RANKS))
        self.weight = torch.nn.Parameter(DTensor.from_local(ones(2, 2), mesh, [Shard(0)]))


UNSEEN: dict[str, Callable[[], torch.nn.Module]] = {
    "DTensor": Sharded,
    "DistributedDataParallel": lambda: DistributedDataParallel(torch.nn.Linear(2, 2)),
    "a compiled module": lambda: cast(torch.nn.Module, torch.compile(torch.nn.Linear(2, 2))),
}


@pytest.mark.parametrize("sender", UNSEEN)
def test_what_sends_without_python_is_missing_aloud_without_a_log(world: None, sender: str) -> None:
    model = UNSEEN[sender]()
    with warnings.catch_warnings(), Ledger(model, device="cpu", mode="phases") as ledger:
        warnings.simplefilter("ignore", NotSeen)
    assert [gap.figures for gap in ledger.gaps] == ["traffic"]
    assert sender in ledger.gaps[0].sentence


class Own(dist.ProcessGroup):
    """A program's own kind of group."""

    def __init__(self, name: str) -> None:
        super().__init__(1, RANKS)  # type: ignore[call-arg]
        self.calls = 0
        backend = everybody()._get_backend(torch.device("cpu"))
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, backend)
        self._set_group_name(name)  # type: ignore[arg-type]

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        self.calls += 1
        return super().allreduce(tensors, opts or dist.AllreduceOptions())


@pytest.mark.parametrize("mode", ["exact", "phases"])
def test_a_program_s_own_group_works_as_without_a_ledger(world: None, mode: str) -> None:
    group = Own(mode)
    with warnings.catch_warnings(), Ledger(device="cpu", mode=mode):
        warnings.simplefilter("ignore", NotSeen)
        group.allreduce([ones(3)]).wait()
        group.broadcast([ones(3)], dist.BroadcastOptions()).wait()
    assert group.calls == 1


def test_arguments_may_have_names(world: None) -> None:
    group: Any = everybody()
    for mode in ("exact", "phases"):
        with Ledger(device="cpu", mode=mode) as ledger, ledger.phase("act"):
            group.allreduce(tensors=[ones(3)]).wait()
        assert moved(ledger) == [("all-reduce", WORLD, 1, 12)]


def test_a_compiler_finds_the_program_without_a_ledger(world: None) -> None:
    def gathered(rows: torch.Tensor) -> torch.Tensor:
        return functional.all_gather_tensor(rows * 2, 0, everybody()) + 1

    torch._dynamo.reset()
    compiled = torch.compile(gathered, backend="aot_eager", fullgraph=True)
    counts = []
    for mode in ("off", "phases", "exact"):
        with warnings.catch_warnings(), Ledger(device="cpu", mode=mode):
            warnings.simplefilter("ignore", NotSeen)
            compiled(ones(8))
        counts.append(counters["stats"]["unique_graphs"])
    assert len(set(counts)) == 1


def test_nothing_moves_within_a_group_of_one(world: None) -> None:
    for mode in ("exact", "phases"):
        with Ledger(device="cpu", mode=mode) as ledger, ledger.phase("act"):
            dist.all_reduce(ones(3), group=dist.new_group([1]))
        assert moved(ledger) == []


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


def test_a_phase_that_moves_nothing_any_more_says_so(world: None) -> None:
    with Ledger(device="cpu", mode="phases") as ledger:
        for step, elements in enumerate((3, 0, 0, 4, 4, 0)):
            with ledger.phase("act", step):
                dist.all_reduce(ones(elements))
            with ledger.phase("still", step):
                pass
    nothing = {Moved(NOTHING, (), None): (0, 0)}
    rows = {where.step: amounts for where, amounts in amounts_of(ledger)}
    assert list(rows) == [0, 3, 1, 5]
    assert rows[1] == rows[5] == nothing
    rank = rank_record(ledger, 1, 0, 0, Nodes(1, "cpu", None))
    assert [(each.step, each.operation, each.link) for each in rank.traffic or []][2:] == [
        (1, NOTHING, None),
        (5, NOTHING, None),
    ]
    assert of_last(rank.traffic or [], "train", []) == []


def test_a_phase_that_moves_now_and_then_keeps_its_newest_steps(world: None) -> None:
    with warnings.catch_warnings(), Ledger(device="cpu", mode="phases") as ledger:
        warnings.simplefilter("ignore", NotSeen)
        for step in range(3 * MOST_STEPS):
            with ledger.phase("act", step):
                dist.all_reduce(ones(step % 2))
    assert len(ledger.traffic.amounts()) <= MOST_STEPS + 1


def test_a_call_that_fails_moves_nothing(world: None) -> None:
    group: Any = everybody()
    for mode in ("exact", "phases"):
        with Ledger(device="cpu", mode=mode) as ledger, ledger.phase("act"), pytest.raises(TypeError):
            group.allreduce("no tensor")
        assert (moved(ledger), ledger.gaps) == ([], [])


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
