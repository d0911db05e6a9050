"""The memory of the card that is rehearsed, at every moment: what a program learns from `torch.cuda`."""

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from harness.config.settings import Hardware
from harness.device.allocator_settings import parse
from harness.device.caching_allocator import CachingAllocator, OutOfMemory
from harness.device.call import Card
from harness.device.outside import budget
from harness.device.replay import CACHE_EMPTIED, Alternative, Moment, Step, advise, follow, moment
from harness.device.snapshot import snapshot
from harness.ledger.events import Event, Storage
from harness.ledger.reconcile import Exhausted, Reservation
from harness.rehearsal.later_steps import Later


class CardMemory:
    """The caching allocator of one card, which follows the events of a ledger.

    `settings` are those of PYTORCH_ALLOC_CONF. `capacity` is what the allocator may reserve, in bytes; None: unknown.
    Where it is used up, the first allocation without room is `exhausted`, and the rest goes on as on a larger card.
    Raises ValueError for a setting that is none.
    """

    def __init__(self, page: Hardware, settings: str, capacity: int | None) -> None:
        self.page, self.settings, self.capacity = page, settings, capacity
        self.allocator = CachingAllocator(parse(settings), capacity, self.total or None)
        self.events: Callable[[], Sequence[Event]] = tuple
        self.storage_of: Callable[[int], Storage | None] = lambda key: None
        self.stream = 0
        self.exhausted: Exhausted | None = None
        self.unknown: dict[str, None] = {}
        """Names of what ran and takes memory that no rule knows."""
        self.uncompiled = False
        """Whether the program wanted to compile something."""
        self.steps: list[Step] = []
        """All that the allocator was asked to do. The keys are storages."""
        self.times = array("q")
        """When that was, in nanoseconds."""
        self.later: Later | None = None
        """The steps of training that follow, where they repeat the last."""
        self._begins: dict[int, int] = {}  # of each step of training: how many `steps` were before
        self._streams = 0
        self._next = 0
        self._most_allocated = 0
        self._most_reserved = Moment()
        self._retries = 0

    @property
    def card(self) -> Card:
        """The card, as rules for its kernels take it."""
        return Card(self.page.capability or 0, self.page.multiprocessors)

    @property
    def total(self) -> int:
        """What the card says it has, in bytes; 0 where its page has no figure."""
        return self.page.memory_torch or self.page.memory_driver or self.page.memory or 0

    @property
    def free(self) -> int:
        """What the card says is free, in bytes."""
        return max(0, (self.capacity or self.total) - self.reserved)

    @property
    def allocated(self) -> int:
        """Bytes in blocks that are in use now."""
        self.catch_up()
        return self.allocator.allocated

    @property
    def reserved(self) -> int:
        """Bytes in segments now."""
        self.catch_up()
        return self.allocator.reserved

    @property
    def peak_allocated(self) -> int:
        """The most bytes in use, whatever the program reset."""
        self.catch_up()
        return self._most_allocated

    @property
    def peak_reserved(self) -> int:
        """The most bytes in segments, whatever the program reset."""
        self.catch_up()
        return self._most_reserved.reserved

    def catch_up(self) -> None:
        """Follow what the ledger has seen since."""
        if self.later is not None:  # the allocator is further than the ledger
            return
        events = self.events()
        for event in events[self._next :]:
            storage = event.storage
            if storage is None or not event.delta:
                continue
            step = storage, event.delta, self.stream
            try:
                self._follow(step, event.time)
            except OutOfMemory:
                self.exhausted = self.exhausted or Exhausted(
                    event.where, event.module, storage.op, event.delta
                )
                self.allocator.lift_limits()
                follow(self.allocator, step)
            if self.allocator.reserved > self._most_reserved.reserved:
                self._most_reserved = moment(len(self.steps) - 1, self.allocator)
            self._most_allocated = max(self._most_allocated, self.allocator.allocated)
        self._next = len(events)

    def begins(self, step: int) -> None:
        """A phase of `step` begins, or the step itself."""
        self.catch_up()
        self._begins.setdefault(step, len(self.steps))

    def go_on(self, more: int) -> None:
        """Follow `more` steps of training that are not seen and repeat the last: memory may be used up in one of them.

        All other figures stay those of the steps that were seen.
        """
        self.catch_up()
        if more > 0 and self.exhausted is None and self._begins:
            number, begin = max(self._begins.items())
            later = Later(self.steps[begin:], number)
            if later.repeats:
                self._retries = self.allocator.retries
                later.follow(self.allocator, more)
                self.later, self.exhausted = later, later.exhausted

    def _follow(self, step: Step, time: int) -> None:
        """Take one step. Raises OutOfMemory."""
        self.steps.append(step)
        self.times.append(time)
        follow(self.allocator, step)

    def _follow_now(self, step: Step) -> None:
        """Take one step that is no event, after all events so far."""
        self.catch_up()
        self._follow(step, self.times[-1] if self.times else 0)

    def new_stream(self) -> int:
        """The number of another stream."""
        self._streams += 1
        return self._streams

    def enter_stream(self, stream: int) -> None:
        """From now on `stream` allocates."""
        self.catch_up()
        self.stream = stream

    def record_stream(self, key: int, stream: int) -> None:
        """`stream` uses the storage too that has this `_cdata`."""
        self.catch_up()
        storage = self.storage_of(key)
        if storage is not None and storage.nbytes:
            self._follow_now((storage, 0, stream))

    def set_fraction(self, fraction: float) -> None:
        """From now on the allocator may reserve this share of the card."""
        self.catch_up()
        if self.exhausted is None:
            self.allocator.set_fraction(fraction)

    def empty_cache(self) -> None:
        """Release what is not in use."""
        self._follow_now(CACHE_EMPTIED)

    def reset_peak(self) -> None:
        """Begin the peaks of `statistics` anew."""
        self.catch_up()
        self.allocator.reset_peaks()

    def reservation(self) -> Reservation:
        """What was reserved, at the first moment when it was most."""
        self.catch_up()
        most = self._most_reserved
        return Reservation(
            most.reserved,
            most.slack,
            most.inactive_split,
            most.segments,
            self.allocator.retries if self.later is None else self._retries,
            self.settings,
            self.exhausted,
        )

    def alternatives(self) -> list[Alternative]:
        """What would be reserved under other settings, best first."""
        self.catch_up()
        steps = self.steps if self.later is None else [*self.steps, *self.later.followed]
        return advise(steps, self.allocator.settings, self.capacity, self.total or None)

    def snapshot(self) -> dict[str, Any]:
        """The history so far, and the segments now, in the format of `torch.cuda.memory._snapshot()`."""
        self.catch_up()
        timed = zip(self.times, self.steps, strict=True)
        return snapshot(timed, self.allocator.settings, self.capacity, self.total or None)

    def statistics(self) -> dict[str, Any]:
        """What `torch.cuda.memory_stats` has, as nested dicts, as far as the twin of the allocator has it."""
        self.catch_up()
        twin = self.allocator
        current_and_peak = {
            "allocated_bytes": {"current": twin.allocated, "peak": twin.peak_allocated},
            "reserved_bytes": {"current": twin.reserved, "peak": twin.peak_reserved},
            "active_bytes": {"current": twin.active},
            "requested_bytes": {"current": twin.requested},
            "inactive_split_bytes": {"current": twin.inactive_split},
            "segment": {"current": twin.segments},
        }
        counts = {"num_alloc_retries": twin.retries, "num_ooms": twin.ooms}
        return {**{name: {"all": figures} for name, figures in current_and_peak.items()}, **counts}


VARIABLES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
"""Environment variables with the settings of PyTorch's allocator. The first that is set counts."""


def of(page: Hardware, world_size: int, allocator: str | None = None) -> CardMemory:
    """The memory of a card of `page` in a world of `world_size` ranks.

    `allocator` are the settings of the caching allocator, by default those of `page`, else those in the environment.
    Raises ValueError for a setting that is none.
    """
    allocator = page.allocator if allocator is None else allocator
    if allocator is None:
        allocator = next((os.environ[name] for name in VARIABLES if name in os.environ), "")
    formed = budget(page, world_size)
    return CardMemory(page, allocator, None if formed is None else formed.bytes)


_memory: CardMemory | None = None


def current() -> CardMemory:
    """The memory of the card that is rehearsed now."""
    assert _memory is not None, "no card is rehearsed"
    return _memory


@contextmanager
def being(memory: CardMemory) -> Iterator[None]:
    """In this context the card with this memory is rehearsed. Raises RuntimeError inside another."""
    global _memory
    if _memory is not None:
        raise RuntimeError("a card is already rehearsed here: end that rehearsal first")
    _memory = memory
    try:
        yield
    finally:
        _memory = None
