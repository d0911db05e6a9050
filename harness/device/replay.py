"""What the caching allocator reserves for a sequence of births and deaths, and with which settings it is less."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from harness.device.allocator_settings import Settings, parse
from harness.device.caching_allocator import CachingAllocator, OutOfMemory

if TYPE_CHECKING:  # it imports torch
    from harness.ledger.events import Event

Step = tuple[Hashable, int, int]
"""A key, bytes and a stream.

More than 0 bytes: the key's block is allocated on the stream. Less: it is freed. 0: it is used on that stream too, as
`record_stream` says; where the key is None, the host has waited for the stream; `CACHE_EMPTIED` empties the cache.
"""

CACHE_EMPTIED: Step = "cache emptied", 0, 0
"""The step at which `empty_cache` was called."""

EXPANDABLE = "expandable_segments:True"
ALTERNATIVES = (
    EXPANDABLE,
    *(f"max_split_size_mb:{mib}" for mib in (64, 128, 256, 512)),
    *(f"roundup_power2_divisions:{steps}" for steps in (4, 8, 16)),
    *(f"garbage_collection_threshold:{share}" for share in (0.6, 0.8)),
)
"""What `advise` tries, each beside the settings that there are."""


@dataclass(frozen=True)
class Moment:
    """A point of a replay, after the step `index`; -1 is before the first. In bytes."""

    index: int = -1
    allocated: int = 0
    reserved: int = 0
    requested: int = 0
    """What was requested, before rounding."""
    inactive_split: int = 0
    """Free, in segments that are partly in use; of expandable segments nothing, as in torch."""
    segments: int = 0
    """How many; an expandable one counts once."""

    @property
    def slack(self) -> int:
        return self.reserved - self.allocated


@dataclass(frozen=True)
class Result:
    """A replay, up to its end or to the first time that memory is out: a program ends there, so nothing follows."""

    most_allocated: Moment
    most_reserved: Moment
    """The first moments with the most."""
    end: Moment
    retries: int
    """How often the cache was emptied for want of memory; the last time too, where that was not enough."""
    out_of_memory: OutOfMemory | None = None
    """What was missing at the step after `end`. None: everything fits."""

    @property
    def fits(self) -> bool:
        return self.out_of_memory is None


@dataclass(frozen=True)
class Alternative:
    """The settings with one option more. In bytes.

    `reserved` is the most at one time: on this card where it fits, otherwise on one without end. `saved` is how much
    less that is than with the settings as they are.
    """

    change: str
    fits: bool
    reserved: int
    saved: int
    retries: int


def replay(
    steps: Iterable[Step], settings: Settings, limit: int | None = None, capacity: int | None = None
) -> Result:
    """Run `steps` through an allocator; `limit` and `capacity` as in `CachingAllocator`. Stops where memory is out."""
    allocator = CachingAllocator(settings, limit, capacity)
    most_allocated = most_reserved = Moment()
    allocated = reserved = 0
    index, error = -1, None
    for index, step in enumerate(steps):
        try:
            follow(allocator, step)
        except OutOfMemory as missing:
            index, error = index - 1, missing.with_traceback(None)
            break
        if allocator.allocated > allocated:
            most_allocated, allocated = moment(index, allocator), allocator.allocated
        if allocator.reserved > reserved:
            most_reserved, reserved = moment(index, allocator), allocator.reserved
    return Result(most_allocated, most_reserved, moment(index, allocator), allocator.retries, error)


def follow(allocator: CachingAllocator, step: Step) -> None:
    """Take one step. Raises OutOfMemory."""
    key, delta, stream = step
    if delta < 0:
        allocator.free(key)
    elif delta > 0:
        allocator.malloc(key, delta, stream)
    elif step is CACHE_EMPTIED:
        allocator.empty_cache()
    elif key is None:
        allocator.synchronize(stream)
    else:
        allocator.record_stream(key, stream)


def moment(index: int, allocator: CachingAllocator) -> Moment:
    """What `allocator` has now, after the step `index`."""
    return Moment(
        index,
        allocator.allocated,
        allocator.reserved,
        allocator.requested,
        allocator.inactive_split,
        allocator.segments,
    )


def allocations(events: Iterable["Event"]) -> list["Event"]:
    """Those of a ledger's events that are the birth or the death of a storage."""
    return [event for event in events if event.storage is not None and event.delta]


def steps_of(allocations: Iterable["Event"]) -> list[Step]:
    """A step for each birth and death, all on one stream. `Moment.index` then counts these events."""
    return [(event.storage, event.delta, 0) for event in allocations]


def advise(
    steps: Sequence[Step], settings: Settings, limit: int | None = None, capacity: int | None = None
) -> list[Alternative]:
    """What would be reserved with each of `ALTERNATIVES`, best first: those that fit, then those that reserve least.

    What would change nothing is left out: what the settings have, and garbage collection without a memory fraction.
    """
    reserved_now = _most(steps, settings, limit, capacity)[1]
    alternatives = []
    for change in ALTERNATIVES:
        other = _with(settings, change)
        if other is not None:
            fits, reserved, retries = _most(steps, other, limit, capacity)
            alternatives.append(Alternative(change, fits, reserved, reserved_now - reserved, retries))
    return sorted(alternatives, key=lambda each: (not each.fits, each.reserved, each.retries))


def _with(settings: Settings, change: str) -> Settings | None:
    """`settings` with the option `change`. None where that is no change, or torch would refuse it."""
    only = parse(change)
    changed = {
        field.name: getattr(only, field.name)
        for field in fields(Settings)
        if getattr(only, field.name) != field.default
    }
    other = replace(settings, **changed)
    no_fraction = settings.per_process_memory_fraction == 1 and "garbage_collection_threshold" in changed
    too_small = (other.max_split_size or settings.large_segment_size) < settings.large_segment_size
    return None if other == settings or no_fraction or too_small else other


def _most(
    steps: Sequence[Step], settings: Settings, limit: int | None, capacity: int | None
) -> tuple[bool, int, int]:
    """Whether `steps` fit, the most that they reserve, and how often the cache was emptied for them."""
    result = replay(steps, settings, limit, capacity)
    if result.fits:
        return True, result.most_reserved.reserved, result.retries
    without_end = replay(steps, replace(settings, per_process_memory_fraction=1.0), None, capacity)
    return False, without_end.most_reserved.reserved, result.retries
