"""Runs side by side: what held the memory at each run's peak, category by category. It reads records, and no torch."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.ledger.categories import CATEGORIES
from harness.record import read
from harness.tables import Table, plain, size

ROWS = (*CATEGORIES, "kernel")
SAVED = "  saved for backward"


@dataclass(frozen=True)
class Run:
    """One record, as far as it can be compared. Figures are bytes; None was not measured."""

    title: str
    place: str
    figures: Mapping[str, int | None]  # of the worst rank, at its peak: categories, kernel, saved, total
    highest: Mapping[str, int | None]  # of the worst rank: each category's own peak, whenever that was
    worst: int | None
    ranks: Mapping[int, int | None]  # each rank's peak
    allocator: int | None
    unattributed: int | None
    failure: str | None


def main(words: Sequence[str]) -> int:
    """`harness compare RUN RUN [...]`; the exit code."""
    parser = argparse.ArgumentParser("harness compare", description="Hold the memory of runs side by side.")
    parser.add_argument("run", nargs="+", type=Path, help="a run's directory, or its record.json")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="exact bytes, as JSON; null was not measured")
    form.add_argument("--markdown", action="store_true", help="as a Markdown table")
    parser.add_argument("--bytes", action="store_true", help="exact bytes in the table")
    asked = parser.parse_args(words)
    if len(asked.run) < 2:
        return _refuse(f"{asked.run[0]} alone has nothing to be compared with; give two runs or more")
    runs = []
    for path in asked.run:
        try:
            runs.append(run_of(read(path), path))
        except ValueError as error:
            return _refuse(str(error))
    if asked.json:
        print(json.dumps(as_json(runs), indent=1))
    else:
        print(compare(runs, markdown=asked.markdown, exact=asked.bytes))
    return 0


def run_of(record: Mapping[str, Any], path: Path) -> Run:
    """The comparable part of `record`. Raises ValueError, naming `path`, where a field is not what the schema says."""
    try:
        model, world = record["model"], record["world"]
        ranks = {int(rank["rank"]): rank for rank in record["ranks"]}
        peaks = {number: _count(rank["peak"]["bytes"]) for number, rank in ranks.items()}
        worst = max(peaks, key=lambda number: (peaks[number] or 0, -number), default=None)
        at_peak = (
            ranks[worst]["peak"] if worst is not None else {"categories": {}, "saved": None, "bytes": None}
        )
        books = ranks[worst]["allocator"] if worst is not None else {"peak": None, "unattributed": None}
        figures = {name: _count(at_peak["categories"].get(name)) for name in ROWS}
        figures |= {SAVED: _count(at_peak["saved"]), "total": _count(at_peak["bytes"])}
        name = "/".join(str(model["name"]).split("/")[-2:])  # of a checkpoint's path, its end
        own = ranks[worst]["categories"] if worst is not None else {}
        highest = {name: _count(own.get(name, {}).get("peak")) for name in CATEGORIES}
        title = f"{plain(record['mode'])} {plain(name)}"
        place = f"{world['size']} x {plain(world['device'])}"
        failure = None
        if record["status"] != "complete":
            told = record.get("failure") or {}
            failure = plain(told.get("error") or "it did not come to its end")
        return Run(
            title,
            place,
            figures,
            highest,
            worst,
            peaks,
            _count(books["peak"]),
            _count(books["unattributed"]),
            failure,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no whole record: {type(error).__name__} {plain(str(error))}") from None


def _count(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise TypeError(f"{value!r} is no count of bytes")


def compare(runs: Sequence[Run], markdown: bool = False, exact: bool = False) -> str:
    """The runs as one table: the worst rank's peak by category, then every rank's; differences are to the first."""
    first, *others = runs
    table = Table(["at the peak of the worst rank", *(run.title for run in runs), *_difference_titles(runs)])
    table.row("", *(run.place for run in runs), *("" for _ in others))
    zero = [name for name in ROWS if all(run.figures[name] == 0 for run in runs)]
    for name in (name for name in ROWS if name not in zero):
        table.row(name, *_cells([run.figures[name] for run in runs], exact))
        if name == "activations":
            table.row(SAVED, *_cells([run.figures[SAVED] for run in runs], exact))
    table.rule()
    table.row("total", *_cells([run.figures["total"] for run in runs], exact))
    table.row("allocator's own peak", *(size(run.allocator, exact) for run in runs), *("" for _ in others))
    table.row("unattributed", *(size(run.unattributed, exact) for run in runs), *("" for _ in others))
    table.rule()
    for name in (name for name in CATEGORIES if any(run.highest[name] for run in runs)):
        table.row(f"highest {name}", *_cells([run.highest[name] for run in runs], exact))
    table.rule()
    for number in sorted({number for run in runs for number in run.ranks}):
        cells = [size(run.ranks[number], exact) if number in run.ranks else "" for run in runs]
        marks = [
            f"{cell} worst" if number == run.worst and len(set(run.ranks.values())) > 1 else cell
            for run, cell in zip(runs, cells, strict=True)
        ]
        table.row(f"rank {number}", *marks, *("" for _ in others))
    lines = [table.markdown() if markdown else table.text(), ""]
    if zero:
        lines.append(f"zero at these peaks: {', '.join(zero)}")
    if any(value is None for run in runs for value in run.figures.values()):
        lines.append("- not measured")
    lines += [f"{run.title} failed: {run.failure}" for run in runs if run.failure]
    lines += [sentence(first, other) for other in others]
    return "\n".join(lines)


def _difference_titles(runs: Sequence[Run]) -> list[str]:
    return ["difference"] if len(runs) == 2 else [f"{run.title} difference" for run in runs[1:]]


def _cells(figures: Sequence[int | None], exact: bool) -> list[str]:
    first, *others = figures
    return [size(figure, exact) for figure in figures] + [
        _difference(first, other, exact) for other in others
    ]


def _difference(first: int | None, other: int | None, exact: bool) -> str:
    if first is None or other is None:
        return "-"
    if first == other:
        return "same"
    factor = f"  x{other / first:.2f}" if first and other else ""
    return f"{'+' if other > first else '-'}{size(abs(other - first), exact)}{factor}"


def sentence(first: Run, other: Run) -> str:
    """What changed the most from `first` to `other`, in words."""
    changes = {
        name: (other.figures[name] or 0) - (first.figures[name] or 0)
        for name in ROWS
        if first.figures[name] is not None and other.figures[name] is not None
    }
    if not changes:
        return f"{first.title} and {other.title}: not measured, so not compared."
    name = max(changes, key=lambda name: abs(changes[name]))
    if not changes[name]:
        return f"{first.title} and {other.title} hold the same bytes in every category."
    grew = "grew" if changes[name] > 0 else "shrank"
    before, after = size(first.figures["total"]), size(other.figures["total"])
    moved = f"{size(first.figures[name])} to {size(other.figures[name])}"
    peak = f"the peak went from {before} to {after}"
    return f"From {first.title} to {other.title} {name} {grew} the most, {moved}; {peak}."


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The same as plain data, in bytes."""
    first = runs[0]

    def against(run: Run) -> dict[str, int | None]:
        return {
            name: None
            if (mine := run.figures[name]) is None or (base := first.figures[name]) is None
            else mine - base
            for name in run.figures
        }

    return {
        "runs": [
            {
                "title": run.title,
                "failure": run.failure,
                "worst_rank": run.worst,
                "peak": {name.strip(): value for name, value in run.figures.items()},
                "highest": dict(run.highest),
                "difference": {name.strip(): value for name, value in against(run).items()},
                "ranks": [{"rank": number, "peak": peak} for number, peak in run.ranks.items()],
                "allocator": {"peak": run.allocator, "unattributed": run.unattributed},
            }
            for run in runs
        ]
    }


def show(record: Mapping[str, Any]) -> str:
    """What a run prints at its end: the worst rank's ledger as a table."""
    run = run_of(record, Path("record"))
    if run.worst is None or run.figures["total"] is None:
        return "ledger  no peak was measured; ledger=exact does"
    rank = next(rank for rank in record["ranks"] if rank["rank"] == run.worst)
    total, where = run.figures["total"], rank["peak"]["where"]
    table = Table(["", "at the peak", "share", "own peak", "at the end"])
    for name in sorted(CATEGORIES, key=lambda name: -(run.figures[name] or 0)):
        own = rank["categories"][name]
        if own["peak"]:
            share = f"{100 * (run.figures[name] or 0) / total:.0f}%"
            table.row(name, size(run.figures[name]), share, size(own["peak"]), size(own["end"]))
            if name == "activations":
                table.row(SAVED, size(run.figures[SAVED]), "", "", "")
    table.row("kernel", size(run.figures["kernel"]), "", "", "")
    table.rule()
    table.row("total", size(total), "", "", "")
    zero = [name for name in CATEGORIES if not rank["categories"][name]["peak"]]
    among = f", the worst of {len(run.ranks)}" if len(run.ranks) > 1 else ""
    place = f"step {where['step']}, {where['phase']}"
    lines = [
        f"ledger  {run.title}, {run.place}: rank {run.worst}{among}; peak in {place}, "
        f"{plain(where['module'] or 'outside any module')}",
        table.text(),
        f"allocator's own peak {size(run.allocator)}, unattributed {size(run.unattributed)}",
    ]
    return "\n".join([*lines, f"zero throughout: {', '.join(zero)}"] if zero else lines)


def _refuse(sentence: str) -> int:
    print(f"harness: {sentence}", file=sys.stderr)
    return 2
