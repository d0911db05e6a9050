"""A rank's trace as the points that are drawn: of every stretch of events the one with most bytes alive, and the least.

Numbers of bytes are what was alive after an event. A peak is never left out; how many events stand for a point is told.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.ledger.categories import CATEGORIES

if TYPE_CHECKING:
    import pyarrow as pa

DRAWN = 800
"""Points of a rank, but for its phases' first events."""

NAMED = 3
"""Holders that a point names, the largest."""


@dataclass(frozen=True)
class Trace:
    """A rank's events as arrays, one element each; texts as numbers into their lists."""

    bytes: np.ndarray  # [events] by which the live set grows
    saved: np.ndarray
    nanoseconds: np.ndarray | None
    category: np.ndarray  # number in `categories`, -1 where a phase begins
    categories: list[str]  # the ledger's, then any that this version does not know
    place: np.ndarray  # number in `places`
    places: list[tuple[Any, ...]]  # step, phase, micro-batch, module
    holder: np.ndarray  # number in `holders`
    holders: list[tuple[str, str]]  # category; an owner's name, or the module and operator
    module: np.ndarray  # number in `modules`
    modules: list[str]  # whose a storage is: the module of a parameter, or the one that ran when it was made

    @cached_property
    def total(self) -> np.ndarray:
        """Bytes alive after each event."""
        return np.cumsum(self.bytes)

    @cached_property
    def highest(self) -> int:
        """The first event after which most bytes are alive."""
        return int(np.argmax(self.total))


def of_table(table: "pa.Table") -> Trace:
    """`trace.read`'s table as arrays."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    found = dict.fromkeys([*CATEGORIES, *(name for name in columns["category"] if name is not None)])
    known = {name: number for number, name in enumerate(found)}
    born: dict[int, tuple[tuple[str, str], str]] = {}  # what a storage is called is told from its birth on
    holders: dict[tuple[str, str], int] = {}
    modules: dict[str, int] = {}
    places: dict[tuple[Any, ...], int] = {}
    rows = {name: np.zeros(table.num_rows, np.int64) for name in ("holder", "module", "place")}
    for index, (step, phase, batch, module, op, category, name, storage) in enumerate(
        zip(*(columns[each] for each in list(columns)[:8]), strict=True)
    ):
        place = step, phase, batch, module
        if storage is not None and storage not in born:
            called = name or f"{module or phase}: {op.partition('.')[0]}"
            born[storage] = (category, called), (_owner(name) if name else module or phase)
        holder, owner = born.get(storage, (("", ""), ""))
        rows["place"][index] = places.setdefault(place, len(places))
        rows["holder"][index] = holders.setdefault(holder, len(holders))
        rows["module"][index] = modules.setdefault(owner, len(modules))
    timed = table.num_rows and columns["nanoseconds"][0] is not None
    return Trace(
        np.array(columns["bytes"], np.int64),
        np.array(columns["saved"], np.int64),
        np.array(columns["nanoseconds"], np.int64) if timed else None,
        np.array([-1 if name is None else known[name] for name in columns["category"]], np.int64),
        list(known),
        rows["place"],
        list(places),
        rows["holder"],
        list(holders),
        rows["module"],
        list(modules),
    )


def _owner(name: str) -> str:
    """The module that has what an owner calls `name`; of an optimizer or a cache, its own part."""
    return name.rpartition(".")[0] or name


def kept(trace: Trace, drawn: int = DRAWN) -> np.ndarray:
    """The events that are drawn, in order."""
    total, events = trace.total, len(trace.bytes)
    if events <= drawn:
        return np.arange(events)
    starts = np.linspace(0, events, drawn // 2, endpoint=False).astype(np.int64)
    ends = [*starts[1:], events]
    found = {0, trace.highest, events - 1, *_phases(trace)[:, 0].tolist()}
    for start, end in zip(starts, ends, strict=True):
        found |= {int(start + np.argmax(total[start:end])), int(start + np.argmin(total[start:end]))}
    return np.array(sorted(found), np.int64)


def _phases(trace: Trace) -> np.ndarray:
    """Stretches of events in one phase: [stretches, 2], the first event and the number of its place."""
    without: dict[tuple[Any, ...], int] = {}
    numbers = np.array(
        [without.setdefault(place[:3], len(without)) for place in trace.places] or [0], np.int64
    )
    of_event = numbers[trace.place]
    turns = np.flatnonzero(np.diff(of_event, prepend=-1))
    return np.stack([turns, trace.place[turns]], axis=1)


def _alive(trace: Trace, groups: np.ndarray, count: int, at: np.ndarray) -> np.ndarray:
    """Bytes alive after each of the events `at`, by group: [points, count]."""
    grown = np.zeros((len(at), count), np.int64)
    point = np.searchsorted(at, np.arange(len(trace.bytes)))
    seen = (groups >= 0) & (point < len(at))
    np.add.at(grown, (point[seen], groups[seen]), trace.bytes[seen])
    return np.cumsum(grown, axis=0)


def drawn(trace: Trace) -> dict[str, Any]:
    """What the page draws of a rank's trace, as plain data."""
    at = kept(trace)
    by_category = _alive(trace, trace.category, len(trace.categories), at)
    by_holder = _alive(trace, trace.holder, len(trace.holders), at)
    largest = np.argsort(-by_holder, axis=1, kind="stable")[:, :NAMED]
    names: dict[str, int] = {}

    def number(text: str) -> int:
        return names.setdefault(text, len(names))

    holders = [
        [
            part
            for group in row
            if by_holder[point, group] > 0
            for part in (number("{}: {}".format(*trace.holders[group])), int(by_holder[point, group]))
        ]
        for point, row in enumerate(largest)
    ]
    saved = np.cumsum(trace.saved)[at]
    return {
        "events": len(trace.bytes),
        "at": at.tolist(),
        "milliseconds": None
        if trace.nanoseconds is None
        else np.round(trace.nanoseconds[at] / 1e6, 3).tolist(),
        "categories": {
            name: by_category[:, index].tolist()
            for index, name in enumerate(trace.categories)
            if by_category[:, index].any()
        },
        "saved": saved.tolist() if saved.any() else None,
        "places": [number(_told(trace.places[place])) for place in trace.place[at]],
        "holders": holders,
        "peak": int(np.searchsorted(at, trace.highest)),
        "phases": [[int(first), *trace.places[place][:3]] for first, place in _phases(trace)],
        "names": list(names),
    }


def _told(place: tuple[Any, ...]) -> str:
    step, phase, micro_batch, module = place
    return f"step {step}, {phase}, micro-batch {micro_batch}, {module or 'outside any module'}"


def at_peak(trace: Trace) -> dict[str, dict[str, int]]:
    """Bytes alive at the trace's own peak, by module and category."""
    count = len(trace.categories)
    pairs = trace.module * count + trace.category
    pairs[trace.category < 0] = -1
    held = _alive(trace, pairs, len(trace.modules) * count, np.array([trace.highest]))[0]
    found: dict[str, dict[str, int]] = {}
    for pair in np.flatnonzero(held):
        module, category = divmod(int(pair), count)
        found.setdefault(trace.modules[module], {})[trace.categories[category]] = int(held[pair])
    return found
