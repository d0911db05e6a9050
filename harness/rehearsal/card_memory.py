"""The memory of the card that is rehearsed, at every moment: what a program learns from `torch.cuda`."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from harness.config.settings import Hardware
from harness.device.allocator_settings import Settings, parse
from harness.device.caching_allocator import CachingAllocator, OutOfMemory
from harness.device.call import Card
from harness.device.outside import budget
from harness.device.snapshot import snapshot
from harness.ledger.events import Event, Storage, Where


class Exhausted(NamedTuple):
    """The first allocation that the card had no room for."""

    where: Where
    module: str
    op: str
    nbytes: int
    """The bytes of that allocation."""


class CardMemory:
    """The caching allocator of one card, which follows the events of a ledger.

    `capacity` is what the allocator may reserve, in bytes; None: unknown. Where it is used up, the first allocation
    without room is `exhausted`, and the rest goes on as on a larger card.
    """

    def __init__(self, page: Hardware, settings: Settings, capacity: int | None) -> None:
        self.page, self.settings, self.capacity = page, settings, capacity
        self.allocator = CachingAllocator(settings, capacity, self.total or None)
        self.events: Callable[[], Sequence[Event]] = tuple
        self.storage_of: Callable[[int], Storage | None] = lambda key: None
        self.stream = 0
        self.exhausted: Exhausted | None = None
        self.unknown: dict[str, None] = {}
        """Names of what ran and takes memory that no rule knows."""
        self.uncompiled = False
        """Whether the program wanted to compile something."""
        self._streams = 0
        self._next = 0
        self._highest = 0, 0

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
        return max(self._highest[0], self.allocator.peak_allocated)

    @property
    def peak_reserved(self) -> int:
        """The most bytes in segments, whatever the program reset."""
        self.catch_up()
        return max(self._highest[1], self.allocator.peak_reserved)

    def catch_up(self) -> None:
        """Follow what the ledger has seen since."""
        events = self.events()
        for event in events[self._next :]:
            storage = event.storage
            if storage is None or not event.delta:
                continue
            if event.delta < 0:
                self.allocator.free(id(storage))
                continue
            try:
                self.allocator.malloc(id(storage), event.delta, self.stream)
            except OutOfMemory:
                self.exhausted = Exhausted(event.where, event.module, storage.op, event.delta)
                self.allocator.device.limit = None
                self.allocator.malloc(id(storage), event.delta, self.stream)
        self._next = len(events)

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
        if storage is not None:
            self.allocator.record_stream(id(storage), stream)

    def empty_cache(self) -> None:
        """Release what is not in use."""
        self.catch_up()
        self.allocator.empty_cache()

    def reset_peak(self) -> None:
        """Begin the peaks of `statistics` anew."""
        self._highest = self.peak_allocated, self.peak_reserved
        self.allocator.reset_peaks()

    def snapshot(self) -> dict[str, Any]:
        """What `torch.cuda.memory._snapshot` would return."""
        return snapshot(self.events(), self.settings, self.capacity, self.total or None)

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

    `allocator` are the settings of the caching allocator, by default those in the environment. Raises ValueError for a
    setting that is none.
    """
    if allocator is None:
        allocator = next((os.environ[name] for name in VARIABLES if name in os.environ), "")
    formed = budget(page, world_size)
    return CardMemory(page, parse(allocator), None if formed is None else formed.bytes)


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
