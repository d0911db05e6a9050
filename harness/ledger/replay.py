"""Computes peaks and phases from the log's events. Plain data in and out."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from harness.ledger.categories import CATEGORIES, KERNEL
from harness.ledger.events import Event, Storage, Where
from harness.ledger.holdings import Holding, holdings_of
from harness.ledger.work import Work


@dataclass
class Peak:
    """The moment with the most live bytes. `categories` has every category, and `kernel`. None: not measured.

    `allocated` and `reserved` are the most bytes that a GPU's caching allocator had in blocks and in segments, each at
    its own moment.
    """

    bytes: int
    where: Where
    module: str
    op: str
    categories: dict[str, int | None]
    saved: int | None
    recomputed: int | None
    holdings: list[Holding] = field(default_factory=list)  # largest first; small ones merged per category
    allocated: int | None = None
    reserved: int | None = None


@dataclass
class Phase:
    """A phase of a step: the most live bytes within it, the live bytes at its end, and its work.

    None: not measured.
    """

    where: Where
    peak: int | None
    end: int | None
    categories: dict[str, int | None]
    saved: int | None = None
    recomputed: int | None = None
    work: Work | None = None


@dataclass
class Category:
    """A category's own highest total, and its total at the end."""

    peak: int | None
    end: int | None


@dataclass
class Live:
    """Running totals by category."""

    totals: dict[str, int]
    saved: int = 0
    recomputed: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.totals.values())

    def apply(self, event: Event) -> None:
        storage = event.storage
        if storage is None:
            return
        self.saved += event.saves
        if storage.recomputed and storage.category == "activations":
            self.recomputed += event.delta
        self.totals[storage.category] += event.delta


def backdated(events: Iterable[Event], opened: int) -> list[Event]:
    """`events` in which storages from before the log exist since it was `opened`, whenever they were named."""
    named_late = {
        id(event.storage): event.storage
        for event in events
        if event.storage is not None and event.storage.base and event.storage.born > opened
    }
    if not named_late:
        return list(events)
    other_events = [event for event in events if event.delta <= 0 or id(event.storage) not in named_late]
    for storage in named_late.values():
        storage.born = opened
    index = bisect_right(other_events, opened, key=lambda event: event.time)
    first_events = [
        Event(opened, storage.nbytes, storage, Where(0, "idle", 0), "") for storage in named_late.values()
    ]
    return [*other_events[:index], *first_events, *other_events[index:]]


def replay(events: Sequence[Event], kernels: bool = False) -> tuple[Peak, dict[str, Category], list[Phase]]:
    """The peak, each category's peak and end, and every phase in order of first entry, from storages alone.

    `kernels`: the events have the memory of kernels too.
    """
    names = (*CATEGORIES, KERNEL) if kernels else CATEGORIES
    unknown: dict[str, int | None] = {} if kernels else {KERNEL: None}
    live = Live(dict.fromkeys(names, 0))
    highest = dict.fromkeys(names, 0)
    phases: dict[Where, Phase] = {}
    peak = Peak(0, Where(0, "idle", 0), "", "", {**live.totals, **unknown}, 0, 0)
    total = highest_at = 0
    for index, event in enumerate(events):
        live.apply(event)
        total += event.delta
        phase = phases.get(event.where)
        if phase is None or total > (phase.peak or 0):
            totals: dict[str, int | None] = {**live.totals}
            phase = Phase(event.where, total, total, totals, live.saved, live.recomputed)
            phases[event.where] = phase
        phase.end = total
        if event.storage is not None:
            category = event.storage.category
            highest[category] = max(highest[category], live.totals[category])
            if total > peak.bytes:
                categories = {**live.totals, **unknown}
                peak = Peak(
                    total,
                    event.where,
                    event.module,
                    event.storage.op,
                    categories,
                    live.saved,
                    live.recomputed,
                )
                highest_at = index
    peak.holdings = holdings_of(_alive(events[: highest_at + 1]))
    return (
        peak,
        {name: Category(highest[name], live.totals[name]) for name in names},
        list(phases.values()),
    )


def _alive(events: Iterable[Event]) -> Iterable[Storage]:
    """The storages alive after `events`."""
    alive: dict[int, Storage] = {}
    for event in events:
        if event.storage is not None and event.delta > 0:
            alive[id(event.storage)] = event.storage
        elif event.storage is not None and event.delta < 0:
            del alive[id(event.storage)]
    return alive.values()
