"""Thins a rank's trace to the points that the page draws: of each stretch of events, the most and the least bytes.

Bytes are those alive after an event. The peak is always drawn. The data has the number of all events and the index of
each drawn one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.ledger.categories import CATEGORIES

if TYPE_CHECKING:
    import pyarrow as pa

DRAWN = 800
"""The most points of a rank, not counting the first events of its phases."""

NAMED = 3
"""How many holders a point names, the largest first."""


@dataclass(frozen=True)
class Trace:
    """A rank's events as arrays of shape [events]; texts are stored as indices into lists."""

    bytes: np.ndarray  # by how many bytes the live set grows
    saved: np.ndarray
    nanoseconds: np.ndarray | None
    category: np.ndarray  # index in `categories`, -1 where a phase begins
    categories: list[str]  # the ledger's, then any that this version does not know
    place: np.ndarray  # index in `places`
    places: list[tuple[Any, ...]]  # step, phase, micro-batch, module
    holder: np.ndarray  # index in `holders`
    holders: list[tuple[str, str]]  # category; an owner's name, or the module and operator
    module: np.ndarray  # index in `modules`
    modules: list[str]  # the module of the storage's parameter, or the module that ran when it was allocated

    @cached_property
    def total(self) -> np.ndarray:
        """Bytes alive after each event."""
        return np.cumsum(self.bytes)

    @cached_property
    def highest(self) -> int:
        """The index of the first event after which the most bytes are alive."""
        return int(np.argmax(self.total))


def of_table(table: "pa.Table") -> Trace:
    """`trace.read`'s table as arrays."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    categories = dict.fromkeys([*CATEGORIES, *(name for name in columns["category"] if name is not None)])
    category_numbers = {name: number for number, name in enumerate(categories)}
    by_storage: dict[int, tuple[tuple[str, str], str]] = {}  # a storage keeps the name of its first event
    holders: dict[tuple[str, str], int] = {}
    modules: dict[str, int] = {}
    places: dict[tuple[Any, ...], int] = {}
    rows = {name: np.zeros(table.num_rows, np.int64) for name in ("holder", "module", "place")}
    for index, (step, phase, batch, module, op, category, name, storage) in enumerate(
        zip(*(columns[each] for each in list(columns)[:8]), strict=True)
    ):
        position = step, phase, batch, module
        if storage is not None and storage not in by_storage:
            label = name or f"{module or phase}: {op.partition('.')[0]}"
            by_storage[storage] = (category, label), (_owner(name) if name else module or phase)
        holder, owner = by_storage.get(storage, (("", ""), ""))
        rows["place"][index] = places.setdefault(position, len(places))
        rows["holder"][index] = holders.setdefault(holder, len(holders))
        rows["module"][index] = modules.setdefault(owner, len(modules))
    timed = table.num_rows and columns["nanoseconds"][0] is not None
    return Trace(
        np.array(columns["bytes"], np.int64),
        np.array(columns["saved"], np.int64),
        np.array(columns["nanoseconds"], np.int64) if timed else None,
        np.array([-1 if name is None else category_numbers[name] for name in columns["category"]], np.int64),
        list(category_numbers),
        rows["place"],
        list(places),
        rows["holder"],
        list(holders),
        rows["module"],
        list(modules),
    )


def _owner(name: str) -> str:
    """The module that an owner's `name` belongs to: `name` without its last part, where it has several."""
    return name.rpartition(".")[0] or name


def kept(trace: Trace, drawn: int = DRAWN) -> np.ndarray:
    """The sorted indices of the events that are drawn."""
    total, count = trace.total, len(trace.bytes)
    if count <= drawn:
        return np.arange(count)
    starts = np.linspace(0, count, drawn // 2, endpoint=False).astype(np.int64)
    ends = [*starts[1:], count]
    events_drawn = {0, trace.highest, count - 1, *_phases(trace)[:, 0].tolist()}
    for start, end in zip(starts, ends, strict=True):
        events_drawn |= {int(start + np.argmax(total[start:end])), int(start + np.argmin(total[start:end]))}
    return np.array(sorted(events_drawn), np.int64)


def _phases(trace: Trace) -> np.ndarray:
    """Stretches of events in one phase, as [stretches, 2]: the index of the first event, and the index of its place."""
    phase_numbers: dict[tuple[Any, ...], int] = {}
    numbers = np.array(
        [phase_numbers.setdefault(place[:3], len(phase_numbers)) for place in trace.places] or [0], np.int64
    )
    of_event = numbers[trace.place]
    starts = np.flatnonzero(np.diff(of_event, prepend=-1))
    return np.stack([starts, trace.place[starts]], axis=1)


def _alive(trace: Trace, groups: np.ndarray, count: int, at: np.ndarray) -> np.ndarray:
    """Bytes alive after each of the events `at`, by group, as [points, count]; group -1 is not counted."""
    alive = np.zeros((len(at), count), np.int64)
    point_of_event = np.searchsorted(at, np.arange(len(trace.bytes)))
    used = (groups >= 0) & (point_of_event < len(at))
    np.add.at(alive, (point_of_event[used], groups[used]), trace.bytes[used])
    return np.cumsum(alive, axis=0)


def drawn(trace: Trace) -> dict[str, Any]:
    """The drawn part of a rank's trace, as plain data for the page."""
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
        "places": [number(_place_text(trace.places[place])) for place in trace.place[at]],
        "holders": holders,
        "peak": int(np.searchsorted(at, trace.highest)),
        "phases": [[int(first), *trace.places[place][:3]] for first, place in _phases(trace)],
        "names": list(names),
    }


def _place_text(place: tuple[Any, ...]) -> str:
    step, phase, micro_batch, module = place
    return f"step {step}, {phase}, micro-batch {micro_batch}, {module or 'outside any module'}"


def at_peak(trace: Trace) -> dict[str, dict[str, int]]:
    """The bytes alive at the trace's own peak, by module and category."""
    count = len(trace.categories)
    pairs = trace.module * count + trace.category
    pairs[trace.category < 0] = -1
    bytes_by_pair = _alive(trace, pairs, len(trace.modules) * count, np.array([trace.highest]))[0]
    by_module: dict[str, dict[str, int]] = {}
    for pair in np.flatnonzero(bytes_by_pair):
        module, category = divmod(int(pair), count)
        by_module.setdefault(trace.modules[module], {})[trace.categories[category]] = int(bytes_by_pair[pair])
    return by_module
