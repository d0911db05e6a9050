"""Training beside generation: a run of each to one scale, with what only one of them has set apart."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from harness.analysis.bars import Bar, Part, part, stacked
from harness.analysis.palette import LOOKS
from harness.record.memory import Rank
from harness.record.schema import Record
from harness.report.content import ReportedRun
from harness.tables import AT_LEAST, size

MODES = {"train": "training", "infer": "generation"}
SAVED = "activations saved for backward"
SHOWN = 8
"""The most ranks that have a row."""

NOTABLE = 0.01
"""A category below this share of its run's peak is in the table, and in no sentence."""

UNEVEN = 0.1
"""Ranks have rows where the lowest peak is below the highest by this share."""

WHY = {
    "gradients": "the backward writes them, the optimizer reads them",
    "optimizer": "Adam's moments, and fp32 weights",
    SAVED: "a part of its activations; a forward keeps them until its backward",
    "kv_cache": "keys and values of each token so far",
}
"""Why only one mode has it."""


class Figure(NamedTuple):
    """Bytes of a category: at the run's peak, and at its own; `least`: its own peak is a lower bound.

    None: not measured.
    """

    at_peak: int | None
    highest: int | None
    least: bool

    @property
    def most(self) -> int | None:
        """The most that was seen."""
        seen = [each for each in (self.at_peak, self.highest) if each is not None]
        return max(seen, default=None)

    @property
    def told(self) -> str:
        """The bytes as text."""
        if self.most is None:
            return "not measured"
        most = f"{AT_LEAST if self.least else 'at most '}{size(self.most)}"
        if self.at_peak is None:
            return most
        return f"{size(self.at_peak)}, {most}" if self.most > self.at_peak else size(self.at_peak)


def contrast(runs: Sequence[ReportedRun]) -> dict[str, Any] | None:
    """The two runs of either mode that are most alike, as plain data; None where the runs are of one mode."""
    of_mode = {mode: [run for run in runs if run.record.mode == mode] for mode in MODES}
    pairs = list(product(*of_mode.values()))
    if not pairs:
        return None
    sides = max(pairs, key=lambda pair: _alike(*(run.record for run in pair)))  # the first of equals
    records = [run.record for run in sides]
    figures = {name: tuple(_figure(record.worst, name) for record in records) for name in _names(records)}
    scale = max([each.most or 0 for pair in figures.values() for each in pair])
    scale = max([scale, *(record.worst.peak.bytes or 0 for record in records)])
    return {
        "sides": [
            {
                "mode": MODES[run.record.mode],
                "name": run.name,
                "failed": run.record.status == "failed",
                "worst": run.record.worst.rank,
                "bar": stacked(run.record.worst.peak.categories, run.record.worst.peak.bytes, scale),
            }
            for run in sides
        ],
        "others": "" if len(pairs) == 1 else _others(of_mode),
        "sentences": list(_sentences(records, figures)),
        "groups": list(_groups(records, figures, scale)),
        "absent": _absent(figures),
        "places": _places(records, scale),
    }


def _others(of_mode: dict[str, list[ReportedRun]]) -> str:
    counts = " and ".join(f"{len(runs)} of {MODES[mode]}" for mode, runs in of_mode.items())
    return f"Of {counts} these two are the most alike; the first, where several are."


def _alike(train: Record, infer: Record) -> tuple[bool, ...]:
    """What two runs have in common, the most important first."""
    return (
        train.model.parameters == infer.model.parameters,
        train.status == infer.status == "complete",
        train.model.multiplied == infer.model.multiplied,
        train.pipeline.stages == infer.pipeline.stages,
        train.world.size == infer.world.size,
        train.world.rehearsed == infer.world.rehearsed,
    )


def _names(records: Sequence[Record]) -> list[str]:
    """The rows: each category, and the part of the activations that waits for a backward."""
    known = {name for record in records for name in (*record.worst.peak.categories, *record.worst.highest)}
    names = [*LOOKS, *sorted(known - LOOKS.keys())]
    after = names.index("activations") + 1
    return [*names[:after], SAVED, *names[after:]]


def _figure(rank: Rank, name: str) -> Figure:
    if name == SAVED:
        return _saved(rank)
    highest, seen = rank.highest.get(name), rank.seen.get(name)
    least = seen is not None and (highest is None or seen > highest)
    return Figure(rank.peak.categories.get(name), seen if least else highest, least)


def _saved(rank: Rank) -> Figure:
    """What autograd keeps: at the peak, and the most that waited for a backward."""
    waiting = None if rank.forwards is None else rank.forwards.bytes
    seen = [each.saved for each in rank.phases if each.saved is not None]
    known = [each for each in (waiting, rank.peak.saved, *seen) if each is not None]
    return Figure(rank.peak.saved, max(known, default=None), False)


def _only(pair: Sequence[Figure]) -> str:
    """The mode that alone has any of it, "both" or "none"; "unknown": not measured in one, "unmeasured": in neither."""
    train, infer = (each.most for each in pair)
    if train is None or infer is None:
        return "unmeasured" if train is infer else "unknown"
    if not train:
        return "infer" if infer else "none"
    return "both" if infer else "train"


TITLES = {
    "train": "Only in training",
    "infer": "Only in generation",
    "both": "In both",
    "unknown": "Not measured in one of them",
}


def _groups(
    records: Sequence[Record], figures: dict[str, tuple[Figure, ...]], scale: int
) -> Iterator[dict[str, Any]]:
    """The rows, by who has them; the largest first."""
    for only, title in TITLES.items():
        names = [name for name, pair in figures.items() if _only(pair) == only]
        names.sort(key=lambda name: -max(each.most or 0 for each in figures[name]))
        if names:
            yield {"only": only, "title": title, "share": _share(records, figures, names, only)} | {
                "rows": [
                    {
                        "name": name,
                        "why": WHY.get(name, "") if only in MODES else "",
                        "bars": [_bar(name, each, scale) for each in figures[name]],
                    }
                    for name in names
                ]
            }


def _share(
    records: Sequence[Record], figures: dict[str, tuple[Figure, ...]], names: Sequence[str], only: str
) -> str:
    """How much of its run's peak the rows of one mode are."""
    if only not in MODES:
        return ""
    side = [*MODES].index(only)
    total = records[side].worst.peak.bytes
    at_peak = sum(figures[name][side].at_peak or 0 for name in names)
    return f"{size(at_peak)} of the {size(total)} at its peak, {at_peak / total:.0%}" if total else ""


def _bar(name: str, figure: Figure, scale: int) -> Bar:
    """A category's bar: solid at the run's peak, and an outline up to its own."""
    solid = figure.at_peak or 0
    category = "activations" if name == SAVED else name
    parts = [part(category, solid, scale, f"{name} {size(solid)} at the peak")] if solid else []
    if (beyond := (figure.most or 0) - solid) > 0:
        outline = part(category, beyond, scale, f"{name} {size(figure.most)} at another moment")
        parts.append(Part("beyond", outline.width, outline.told))
    told = "none" if figure.most == 0 else figure.told
    return Bar(parts, told)


def _absent(figures: dict[str, tuple[Figure, ...]]) -> list[str]:
    """The categories that have no row, and why."""
    meanings = {"none": "0 B in both", "unmeasured": "Not measured in either"}
    names = {only: [name for name, pair in figures.items() if _only(pair) == only] for only in meanings}
    return [f"{meaning}: {', '.join(names[only])}" for only, meaning in meanings.items() if names[only]]


def _sentences(records: Sequence[Record], figures: dict[str, tuple[Figure, ...]]) -> Iterator[str]:
    train, infer = (record.worst.peak.bytes for record in records)
    if train and infer:
        times = f"{train / infer:,.1f} times" if train != infer else "as much as"
        yield f"On its worst rank training peaks at {size(train)}, {times} generation's {size(infer)}."
    for only, mode in MODES.items():
        side = [*MODES].index(only)
        total = records[side].worst.peak.bytes or 0
        has = {name: pair[side].most or 0 for name, pair in figures.items() if _only(pair) == only}
        has = {name: nbytes for name, nbytes in has.items() if nbytes >= NOTABLE * total}
        largest = sorted(has, key=lambda name: -has[name])
        if largest:
            yield f"Only {mode} has {_listed([f'{name} ({size(has[name])})' for name in largest])}."


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _places(records: Sequence[Record], scale: int) -> dict[str, Any] | None:
    """The stages, or else ranks whose peaks differ, with the forwards that wait on each for their backward."""
    if any(record.pipeline.stages > 1 for record in records):
        kind, maps = "stage", [dict(record.by_stage) for record in records]
    else:
        kind, maps = "rank", [{n: rank for rank in record.ranks for n in rank.numbers} for record in records]
        if not any(map(_uneven, records)):
            return None
    numbers = _numbers(records, kind)
    return {
        "kind": kind,
        "sentence": _waiting(maps) if kind == "stage" else _shown(records, numbers),
        "rows": [{"number": n, "cells": [_place(ranks.get(n), scale) for ranks in maps]} for n in numbers],
    }


def _numbers(records: Sequence[Record], kind: str) -> list[int]:
    """The stages; of the ranks those with the highest peaks."""
    if kind == "stage":
        return sorted({stage for record in records for stage in record.by_stage})
    ranks = [rank for record in records for rank in record.ranks]
    ranks.sort(key=lambda rank: -(rank.peak.bytes or 0))
    return sorted([*dict.fromkeys(rank.rank for rank in ranks)][:SHOWN])


def _uneven(record: Record) -> bool:
    peaks = [rank.peak.bytes for rank in record.ranks if rank.peak.bytes is not None]
    return bool(peaks) and min(peaks) < (1 - UNEVEN) * max(peaks)


def _place(rank: Rank | None, scale: int) -> dict[str, Any] | None:
    """A stage's or a rank's peak, and each forward that waits there, to the scale of everything else."""
    if rank is None:
        return None
    forwards = rank.forwards
    stashes = [] if forwards is None else forwards.stashes or [forwards.bytes] * bool(forwards.alive)
    parts = [part("activations", each, scale, f"a forward of {size(each)}") for each in stashes]
    waiting = "forwards not measured" if forwards is None else "no forward waits"
    if forwards is not None and forwards.alive:
        plural = "forward waits" if forwards.alive == 1 else "forwards wait"
        waiting = f"{forwards.alive} {plural}, {size(forwards.bytes)}"
    return {
        "peak": stacked(rank.peak.categories, rank.peak.bytes, scale),
        "waiting": Bar(parts, waiting),
    }


def _waiting(maps: Sequence[dict[int, Rank]]) -> str:
    """How many forwards wait at once on each stage, in either mode."""
    parts = []
    for mode, ranks in zip(MODES.values(), maps, strict=True):
        alive = [rank.forwards.alive for _, rank in sorted(ranks.items()) if rank.forwards is not None]
        if len(alive) == len(ranks) and alive:
            counts = _listed([*map(str, alive)]) if any(alive) else "none"
            parts.append(f"in {mode} {counts}")
    return f"Forwards that wait for their backward at once, by stage: {'; '.join(parts)}." if parts else ""


def _shown(records: Sequence[Record], numbers: Sequence[int]) -> str:
    most = max(record.world.size for record in records)
    return f"The {len(numbers)} ranks of {most} with the highest peaks." if len(numbers) < most else ""
