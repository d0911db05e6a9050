"""The allocator's own account of memory, against which the log is held. It shares nothing with the log.

On CPU it is the allocation events that PyTorch's allocator reports to its profiler: every block, those
inside kernels too, with address, size and time. The profiler runs with no operator scope, so that
it records allocations alone. Known limits: only this thread's events are reported, and of blocks that were
made before the start only the ones that an earlier profile saw are reported when they go.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch

from harness.ledger.replaced import replaced
from harness.ledger.unseen import Unseen

_silent = False

PROFILED = (
    "a profiler of the program's own, or of another ledger, has the allocator's events: the allocator's peak, kernel "
    "and what is unattributed are not measured, and operators are in that profile twice"
)


class Allocation(NamedTuple):
    """A block of `delta` bytes came (or, below 0, went) at address `pointer`, at `time` in nanoseconds."""

    time: int
    pointer: int
    delta: int


class CpuAllocator:
    """PyTorch's CPU allocator, through the profiler's raw allocation events."""

    source = "cpu-events"

    def __init__(self) -> None:
        self.running = False

    def start(self) -> bool:
        """Begin to record; False where somebody else's profiler already runs, for only one can."""
        from torch._C import _autograd
        from torch._C._profiler import ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig

        if torch._C._autograd._profiler_enabled():
            return False
        config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
        activities = {torch.profiler.ProfilerActivity.CPU}
        kineto: Any = _autograd
        with _in_silence():
            older = [torch.UntypedStorage(1)]
            kineto._prepare_profiler(config, activities)
            kineto._enable_profiler(config, activities, {RecordScope.USER_SCOPE})
            older.clear()  # of the first block that goes and was there before, the allocator warns
        self.running = True
        return True

    @contextmanager
    def giving_way(self, unseen: Unseen) -> Iterator[None]:
        """Within it a profiler that the program starts is the only one, as without a ledger."""

        def first(start: Callable[..., Any]) -> Callable[..., Any]:
            def started(*args: Any, **kwargs: Any) -> Any:
                if self.running and torch._C._autograd._profiler_enabled():  # in this thread
                    self.stop()
                    unseen.note("profiler", "allocator", PROFILED)
                return start(*args, **kwargs)

            return started

        with ExitStack() as undo:
            for name in ("_prepare_profiler", "_enable_profiler", "_enable_profiler_legacy"):
                start = getattr(torch.autograd.profiler, name, None)
                if start is not None:
                    undo.enter_context(replaced(torch.autograd.profiler, name, first(start)))
            yield

    def stop(self) -> list[Allocation] | None:
        """Every block's coming and going since `start`, in order; None where it never started."""
        if not self.running:
            return None
        self.running = False
        result = torch._C._autograd._disable_profiler()
        return sorted(_allocations(result.experimental_event_tree()), key=lambda event: event.time)


@contextmanager
def _in_silence() -> Iterator[None]:
    """The first time in a process nothing is written to stderr within it: kineto and the allocator would, and once."""
    global _silent
    if _silent:
        yield
        return
    _silent = True
    added = "KINETO_LOG_LEVEL" not in os.environ
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with ExitStack() as undo:
        if added:
            undo.callback(os.environ.pop, "KINETO_LOG_LEVEL")
        with suppress(OSError):  # there is no stderr
            kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            undo.callback(os.close, kept)
            undo.callback(os.close, nowhere)
            undo.callback(os.dup2, kept, 2)
            os.dup2(nowhere, 2)
        yield


def _allocations(events: Any) -> Iterator[Allocation]:
    for event in events:
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            if fields.device.type == "cpu":
                yield Allocation(event.start_time_ns, fields.ptr, fields.alloc_size)
        yield from _allocations(event.children)


class CudaAllocator:
    """PyTorch's CUDA allocator, through its own statistics, none of which is reset. It has no events to hear."""

    source = "cuda"

    def __init__(self) -> None:
        self._before = 0

    def start(self) -> bool:
        """Remember the highest count so far."""
        self._before = torch.cuda.max_memory_allocated()
        return True

    def stop(self) -> None:
        """Statistics have no events."""

    def highest(self) -> int | None:
        """The highest count of allocated bytes; None where a moment before `start` was higher still."""
        highest = torch.cuda.max_memory_allocated()
        return highest if highest > self._before else None
