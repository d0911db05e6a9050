"""PyTorch's CUDA caching allocator: its own history of blocks, and its statistics, none of which is reset.

The history is the one that torch records for its memory snapshots, here without stacks. An entry has the bytes that
were requested, not those of the block, and microseconds since 1970: torch stamps it with the processor's counter, and
translates that when the snapshot is taken. What calls `torch.cuda` here has never run on CUDA.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from time import time_ns
from typing import Any

import torch

from harness.ledger.allocator import Allocation
from harness.ledger.patch import DoesNotFit, patched
from harness.ledger.patch_table import PATCHES
from harness.ledger.unseen import Unseen

BLOCK = 512
"""CUDA's caching allocator rounds sizes up to multiples of this: kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp."""

ENTRIES = 2_000_000
"""How many of the last entries torch keeps: about 200 bytes each, and 1 KiB each where the ledger reads them."""

_LOST = "the allocator's peak, kernel and what is unattributed are not measured, only its statistics"
THEIRS = f"another tool has torch record the history of CUDA's allocator: {_LOST}"
TOO_LONG = (
    f"the history of CUDA's allocator has more than {ENTRIES:,} entries, and torch lost the first: {_LOST}"
)
SHARED = "other processes use this GPU, so that what lies outside torch is not known"

_DELTAS = {"alloc": 1, "free_requested": -1}
"""A block is allocated until its free is requested, as in torch's `allocated_bytes`. It may be reused only later."""


def allocations_of(history: Iterable[Mapping[str, Any]], since: int = 0) -> Iterator[Allocation]:
    """The allocations and frees in `history`, a device's list in `device_traces` of torch's snapshot.

    Bytes are rounded up to `BLOCK`. Times are in nanoseconds, the middle of the microsecond; they grow, so that the
    order is that of the history. What was before `since`, in nanoseconds, is left out.
    """
    last = 0
    for entry in history:
        sign = _DELTAS.get(entry["action"])
        if sign is None or 1000 * entry["time_us"] + 1000 <= since:
            continue
        last = max(last + 1, 1000 * entry["time_us"] + 500)
        yield Allocation(last, entry["addr"], sign * -(-entry["size"] // BLOCK) * BLOCK)


class CudaAllocator:
    """The caching allocator of the current GPU. Without `history` only its statistics are read.

    `source` says what its figures come from: "cuda-events" after a `stop` with a history, otherwise "cuda".
    """

    clock_error = 3000
    """Nanoseconds: half of a microsecond, what keeps times in order, and what torch's translation may be off."""

    def __init__(self, unseen: Unseen | None = None, history: bool = True) -> None:
        self.running, self.source = False, "cuda"
        self._unseen, self._history = unseen or Unseen(), history
        self._device = self._began = self._allocated = self._reserved = 0
        self._highest = 0, 0

    def start(self) -> bool:
        """Remember the highest byte counts so far, and begin to record.

        False where it does not record; with a gap if it was to: another tool records already, or torch cannot.
        """
        if not torch.cuda.is_available():
            self._unseen.note("history", "allocator", f"torch sees no GPU here: {_LOST}")
            return False
        self._device, self._began = torch.cuda.current_device(), time_ns()
        self._allocated = torch.cuda.max_memory_allocated(self._device)
        self._reserved = torch.cuda.max_memory_reserved(self._device)
        try:
            if self._history and torch._C._cuda_isHistoryEnabled():
                self._unseen.note("history", "allocator", THEIRS)
            elif self._history:
                _record(enabled="all", context=None, stacks="python", max_entries=ENTRIES)
                self.running = True
        except RuntimeError as error:  # an allocator of another kind, as cudaMallocAsync
            reason = str(error).partition("\n")[0]
            self._unseen.note("history", "allocator", f"{reason}: {_LOST}")
        return self.running

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        """Inside this context a history that the program has torch record, or ends, replaces this one."""

        def stopping_ours(record: Callable[..., Any]) -> Callable[..., Any]:
            def record_theirs(enabled: Any = "all", *args: Any, **kwargs: Any) -> Any:
                if self.running:
                    self._end()
                    self._unseen.note("history", "allocator", THEIRS)
                return record(enabled, *args, **kwargs)

            return record_theirs

        def resetting(reset: Callable[..., Any]) -> Callable[..., Any]:
            def reset_theirs(device: Any = None) -> Any:
                self._highest = self.allocated() or 0, self.reserved() or 0
                self._allocated = self._reserved = 0
                return reset(device)

            return reset_theirs

        patches = [PATCHES["torch.cuda.memory._record_memory_history"].by(stopping_ours)]
        for owner in ("torch.cuda", "torch.cuda.memory"):
            patches.append(PATCHES[f"{owner}.reset_peak_memory_stats"].by(resetting))
        with ExitStack() as undo:
            try:
                undo.enter_context(patched(*patches))
            except DoesNotFit as error:
                self._end()
                self._unseen.leave_out(error, "allocator", _LOST)
            yield

    def _end(self) -> None:
        self.running = False
        _record(enabled=None)

    def stop(self) -> list[Allocation] | None:
        """All allocations and frees since `start`, in order of time. None where they were not recorded."""
        if not self.running:
            return None
        try:
            history = torch.cuda.memory._snapshot()["device_traces"][self._device]
        finally:
            self._end()
        if len(history) >= ENTRIES:
            self._unseen.note("history", "allocator", TOO_LONG)
            return None
        self.source = "cuda-events"
        return [*allocations_of(history, self._began)]

    def allocated(self) -> int | None:
        """The most bytes in blocks since `start`. None if there were more before."""
        return self._most(0, torch.cuda.max_memory_allocated(self._device), self._allocated)

    def reserved(self) -> int | None:
        """The most bytes in segments since `start`. None if there were more before."""
        return self._most(1, torch.cuda.max_memory_reserved(self._device), self._reserved)

    def _most(self, figure: int, now: int, before: int) -> int | None:
        """The most of a figure, also of what the program's resets have closed."""
        return max(self._highest[figure], now if now > before else 0) or None

    def outside(self) -> int | None:
        """Bytes of the GPU in use now outside torch's allocator: CUDA's context, libraries' own.

        None where other processes use the GPU too, or where NVML, which lists them, is not there.
        """
        try:
            free, total = torch.cuda.mem_get_info(self._device)
            processes = number_of_processes(torch.cuda.list_gpu_processes(self._device))
        except Exception:  # NVML's errors are its own
            return None
        if processes > 1:
            self._unseen.note("outside", "allocator", SHARED)
        return total - free - torch.cuda.memory_reserved(self._device) if processes == 1 else None


def number_of_processes(listed: str) -> int:
    """How many processes are in the text of `torch.cuda.list_gpu_processes`; 0 where it could not list them."""
    return sum(line.startswith("process ") for line in listed.splitlines())


def _record(**options: Any) -> None:
    torch.cuda.memory._record_memory_history(**options)
