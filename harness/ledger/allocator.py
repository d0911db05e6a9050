"""The allocator's own account of memory, against which the log is checked. It shares nothing with the log.

On CPU it consists of the allocation events that PyTorch's allocator reports to its profiler: every block with
address, size and time, also blocks inside kernels. The profiler runs without an operator scope, so that it
records only allocations. Known limits: only this thread's events are reported. The free of a block that was
allocated before the start is reported only if an earlier profile saw the block. CUDA's is in `cuda_allocator.py`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch

from harness.ledger.patch import DoesNotFit, patched
from harness.ledger.patch_table import PATCHES
from harness.ledger.unseen import Unseen

_silenced_before = False

PROFILED = (
    "a profiler of the program's own, or of another ledger, has the allocator's events: the allocator's peak, kernel "
    "and what is unattributed are not measured, and operators are in that profile twice"
)


class Allocation(NamedTuple):
    """A block of `delta` bytes at address `pointer` is allocated (freed if negative), at `time` in nanoseconds."""

    time: int
    pointer: int
    delta: int


class CpuAllocator:
    """PyTorch's CPU allocator, through the profiler's raw allocation events."""

    source, clock_error = "cpu-events", 500

    def __init__(self, unseen: Unseen | None = None) -> None:
        self.running, self._unseen = False, unseen or Unseen()

    def start(self) -> bool:
        """Begin to record. False, and a gap, if another profiler already runs: only one can."""
        from torch._C import _autograd
        from torch._C._profiler import ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig

        if torch._C._autograd._profiler_enabled():
            self._unseen.note("profiler", "allocator", PROFILED)
            return False
        config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
        activities = {torch.profiler.ProfilerActivity.CPU}
        kineto: Any = _autograd
        with _stderr_silenced():
            earlier_block = [torch.UntypedStorage(1)]
            kineto._prepare_profiler(config, activities)
            kineto._enable_profiler(config, activities, {RecordScope.USER_SCOPE})
            earlier_block.clear()  # the allocator warns at the first free of a block that it did not record
        self.running = True
        return True

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        """Inside this context a profiler that the program starts replaces this one, as it runs without a ledger.

        Where a patch does not fit, this one ends at once: the program's would fail.
        """

        def stopping_ours(start: Callable[..., Any]) -> Callable[..., Any]:
            def start_theirs(*args: Any, **kwargs: Any) -> Any:
                if self.running and torch._C._autograd._profiler_enabled():  # in this thread
                    self.stop()
                    self._unseen.note("profiler", "allocator", PROFILED)
                return start(*args, **kwargs)

            return start_theirs

        names = "_prepare_profiler", "_enable_profiler", "_enable_profiler_legacy"
        patches = [PATCHES[f"torch.autograd.profiler.{name}"].by(stopping_ours) for name in names]
        with ExitStack() as undo:
            try:
                undo.enter_context(patched(*patches))
            except DoesNotFit as error:
                self.stop()
                self._unseen.leave_out(error, "allocator", "the allocator's own peak is not measured")
            yield

    def stop(self) -> list[Allocation] | None:
        """All allocations and frees since `start`, in order of time. None if it never started."""
        if not self.running:
            return None
        self.running = False
        result = torch._C._autograd._disable_profiler()
        return sorted(_allocations(result.experimental_event_tree()), key=lambda event: event.time)


@contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Send stderr to the null device, the first time in a process.

    At the first start kineto and the allocator write to stderr, once per process.
    """
    global _silenced_before
    if _silenced_before:
        yield
        return
    _silenced_before = True
    sets_log_level = "KINETO_LOG_LEVEL" not in os.environ
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with ExitStack() as undo:
        if sets_log_level:
            undo.callback(os.environ.pop, "KINETO_LOG_LEVEL")
        with suppress(OSError):  # there is no stderr
            stderr_copy, null_device = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            undo.callback(os.close, stderr_copy)
            undo.callback(os.close, null_device)
            undo.callback(os.dup2, stderr_copy, 2)
            os.dup2(null_device, 2)
        yield


def _allocations(events: Any) -> Iterator[Allocation]:
    for event in events:
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            if fields.device.type == "cpu":
                yield Allocation(event.start_time_ns, fields.ptr, fields.alloc_size)
        yield from _allocations(event.children)
