"""CUDA's allocator beside the ledger's log: its history, as the twin of the allocator writes it, closes to the byte."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

from harness import Ledger, rehearse
from harness.device.allocator_settings import parse
from harness.device.replay import allocations
from harness.device.snapshot import snapshot, timed
from harness.device.workspaces import recognized
from harness.ledger.account import Account, final_account
from harness.ledger.allocator import Allocation
from harness.ledger.categories import KERNEL
from harness.ledger.cuda_allocator import ENTRIES, CudaAllocator, allocations_of
from harness.ledger.holdings import Holding
from harness.ledger.reconcile import Libraries
from harness.ledger.unseen import NotSeen, Unseen

CARD = "rtx4090"
CUBLAS = recognized(8.9, os.environ)
Entry = dict[str, Any]


def program() -> None:
    """Two steps of a small classifier, whose embedding and softmax have scratch on a GPU, and whose loss is in bf16."""
    there: Any = {"device": "cuda", "dtype": torch.bfloat16}
    model = torch.nn.Sequential(
        torch.nn.Embedding(5000, 96, **there),
        torch.nn.Linear(96, 200, **there),
        torch.nn.GELU(),
        torch.nn.Linear(200, 5000, **there),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        tokens = torch.randint(5000, (4, 1100), device="cuda")
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Real:
    """What a ledger on the card would have: its log, which sees no kernel, and torch's history of the allocator."""

    log: Any
    history: list[Entry]
    expected: Any = None  # the rehearsal's peak

    def account(self, torch_cuda: "TorchCuda", libraries: Libraries | None = CUBLAS) -> Account:
        allocator = CudaAllocator(self.log.unseen)
        allocator.start()
        torch_cuda.history = self.history
        return final_account(self.log, allocator, True, libraries)


@pytest.fixture
def real() -> Real:
    with rehearse(CARD) as ledger:
        program()
    log: Any = ledger._log
    history = snapshot(timed(ledger.events), parse(""))["device_traces"][0]
    born = [event.storage for event in allocations(ledger.events) if event.delta > 0]
    for storage, entry in zip(born, [each for each in history if each["action"] == "alloc"], strict=True):
        assert storage is not None
        storage.pointer = entry["addr"]
    log.events = [each for each in log.events if each.storage is None or each.storage.category != KERNEL]
    log.kernels = None
    return Real(log, history, ledger.peak)


@dataclass
class TorchCuda:
    """Stands in for the calls into `torch.cuda`, which needs a GPU. Who records is `recorder`."""

    history: list[Entry] = field(default_factory=list)
    recorder: str | None = None
    processes: str = "GPU:0\nprocess    1234 uses    300.000 MB GPU memory"
    raises: str = ""

    def record(self, enabled: str | None = "all", *args: Any, **kwargs: Any) -> None:
        if self.raises and enabled:
            raise RuntimeError(self.raises)
        self.recorder = enabled and ("ledger" if kwargs.get("max_entries") == ENTRIES else "program")


@pytest.fixture
def torch_cuda(monkeypatch: pytest.MonkeyPatch) -> TorchCuda:
    stand_in = TorchCuda()
    allocated, reserved = iter((100, 200)), iter((1000, 2500))  # before, and since

    def record(enabled: Any = "all", *args: Any, **kwargs: Any) -> None:
        stand_in.record(enabled, *args, **kwargs)

    for name, value in {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.max_memory_allocated": lambda device: next(allocated),
        "torch.cuda.max_memory_reserved": lambda device: next(reserved),
        "torch.cuda.memory_reserved": lambda device: 2000,
        "torch.cuda.mem_get_info": lambda device: (10_000, 15_000),
        "torch.cuda.list_gpu_processes": lambda device: stand_in.processes,
        "torch.cuda.memory._record_memory_history": record,
        "torch.cuda.memory._snapshot": lambda: {"device_traces": [stand_in.history]},
        "torch._C._cuda_isHistoryEnabled": lambda: stand_in.recorder is not None,
    }.items():
        monkeypatch.setattr(name, value, raising=False)
    monkeypatch.setattr("harness.ledger.cuda_allocator.time_ns", lambda: 0)
    return stand_in


def test_the_books_close_to_the_byte_and_name_what_cublas_keeps(real: Real, torch_cuda: TorchCuda) -> None:
    account = real.account(torch_cuda)
    assert account.accounting.unattributed == 0
    assert account.accounting.source == "cuda-events"
    assert account.peak is not None
    assert account.accounting.peak == account.peak.bytes == real.expected.bytes
    assert account.peak.categories == real.expected.categories
    assert account.accounting.externally_owned == 0
    assert workspaces(account.peak.holdings) == workspaces(real.expected.holdings) > 0


def workspaces(holdings: Iterable[Holding]) -> int:
    return sum(each.bytes for each in holdings if "cuBLAS workspace" in each.name)


def test_what_cublas_keeps_is_unattributed_where_nobody_names_it(real: Real, torch_cuda: TorchCuda) -> None:
    unattributed = real.account(torch_cuda, None).accounting.unattributed
    assert unattributed == workspaces(real.expected.holdings)


def test_a_block_of_nobody_s_is_unattributed(real: Real, torch_cuda: TorchCuda) -> None:
    middle = len(real.history) // 4
    stray = {**real.history[middle], "action": "alloc", "addr": 2**50, "size": 12_345}
    real.history.insert(middle, stray)
    assert real.account(torch_cuda).accounting.unattributed == 12_800


def test_statistics_are_added(real: Real, torch_cuda: TorchCuda) -> None:
    account = real.account(torch_cuda)
    assert account.peak is not None
    assert (account.peak.allocated, account.peak.reserved) == (200, 2500)
    accounting = account.accounting
    assert accounting.reservation is not None
    assert accounting.reservation[:2] == (2500, 2300)
    assert accounting.outside == 3000


@pytest.mark.parametrize(
    ("listed", "outside", "gap"),
    [
        ("pynvml module not found, please install nvidia-ml-py", None, False),
        ("GPU:0\nno processes are running", None, False),
        ("GPU:0\nprocess 1 uses 2 MB\nprocess 3 uses 4 MB", None, True),
        ("GPU:0\nprocess 1 uses 2 MB", 3000, False),
    ],
)
def test_what_lies_outside_torch_is_known_only_of_a_gpu_of_one_s_own(
    torch_cuda: TorchCuda, listed: str, outside: int | None, gap: bool
) -> None:
    unseen, torch_cuda.processes = Unseen(), listed
    assert CudaAllocator(unseen).outside() == outside
    assert [each.sentence.startswith("other processes use this GPU") for each in unseen.gaps()] == [
        True
    ] * gap


def test_another_s_history_is_left_alone_and_statistics_remain(real: Real, torch_cuda: TorchCuda) -> None:
    torch_cuda.recorder = "program"
    account = real.account(torch_cuda)
    assert torch_cuda.recorder == "program"
    assert (account.accounting.source, account.accounting.peak) == ("cuda", 200)
    assert account.accounting.unattributed is None
    assert account.peak is not None
    assert account.peak.categories[KERNEL] is None
    assert ["another tool" in gap.sentence for gap in real.log.unseen.gaps()] == [True]


def test_no_history_is_recorded_where_none_is_wanted(torch_cuda: TorchCuda) -> None:
    unseen = Unseen()
    assert not CudaAllocator(unseen, history=False).start()
    assert torch_cuda.recorder is None
    assert unseen.gaps() == []


@pytest.mark.parametrize("theirs", ["all", None])
def test_a_history_that_the_program_begins_or_ends_replaces_the_ledger_s(
    torch_cuda: TorchCuda, theirs: Literal["all"] | None
) -> None:
    unseen = Unseen()
    allocator = CudaAllocator(unseen)
    assert allocator.start()
    assert torch_cuda.recorder == "ledger"
    with allocator.giving_way():
        torch.cuda.memory._record_memory_history(theirs)
    assert torch_cuda.recorder == (theirs and "program")
    assert allocator.stop() is None
    assert torch_cuda.recorder == (theirs and "program")
    assert len(unseen.gaps()) == 1


def test_the_ledger_s_own_history_ends_with_it(torch_cuda: TorchCuda) -> None:
    allocator = CudaAllocator()
    assert allocator.start()
    with allocator.giving_way():
        pass
    assert allocator.stop() == []
    assert torch_cuda.recorder is None


def test_an_allocator_without_history_is_a_gap(torch_cuda: TorchCuda) -> None:
    torch_cuda.raises, unseen = "cudaMallocAsync does not yet support recordHistory.\nAnd more.", Unseen()
    allocator = CudaAllocator(unseen)
    assert not allocator.start()
    assert [gap.sentence.partition(":")[0] for gap in unseen.gaps()] == [
        "cudaMallocAsync does not yet support recordHistory."
    ]


def test_a_history_that_lost_its_beginning_is_not_used(
    torch_cuda: TorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.ledger.cuda_allocator.ENTRIES", 2)
    unseen = Unseen()
    allocator = CudaAllocator(unseen)
    allocator.start()
    torch_cuda.history = [entry("alloc", 1, 2, 5), entry("free_requested", 1, 2, 5)]
    assert allocator.stop() is None
    assert allocator.source == "cuda"
    assert ["torch lost the first" in gap.sentence for gap in unseen.gaps()] == [True]


def entry(action: str, address: int, size: int, microsecond: int) -> Entry:
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": microsecond}


def test_a_history_keeps_its_order_within_a_microsecond() -> None:
    history = [
        *(entry("segment_alloc", 7, 2**21, 3), entry("alloc", 7, 1, 3), entry("free_requested", 7, 1, 3)),
        *(entry("free_completed", 7, 1, 3), entry("alloc", 7, 513, 3), entry("snapshot", 0, 0, 4)),
    ]
    assert [*allocations_of(history)] == [
        Allocation(3500, 7, 512),
        Allocation(3501, 7, -512),
        Allocation(3502, 7, 1024),
    ]
    assert [*allocations_of(history, since=4000)] == []


def test_the_most_is_kept_where_the_program_resets_it(
    torch_cuda: TorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = {"allocated": 100}
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: most["allocated"])
    monkeypatch.setattr(
        "torch.cuda.memory.reset_peak_memory_stats", lambda device=None: most.update(allocated=10)
    )
    allocator = CudaAllocator()
    allocator.start()
    with allocator.giving_way():
        most["allocated"] = 300
        torch.cuda.memory.reset_peak_memory_stats()
        most["allocated"] = 200
        assert allocator.allocated() == 300


def test_a_history_that_cannot_be_read_is_ended_all_the_same(
    torch_cuda: TorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr("torch.cuda.memory._snapshot", fail)
    allocator = CudaAllocator()
    assert allocator.start()
    with pytest.raises(RuntimeError, match="CUDA error"):
        allocator.stop()
    assert torch_cuda.recorder is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_ledger_of_a_gpu_that_is_not_there_harms_nothing() -> None:
    with pytest.warns(NotSeen, match="torch sees no GPU here"), Ledger(device="cuda"):
        torch.ones(3)
