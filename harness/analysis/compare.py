"""Compares runs side by side: the memory at each run's peak by category. It reads records and imports no torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, NamedTuple

from harness.analysis.args import Parser, refuse
from harness.analysis.findings.pipeline import grew
from harness.analysis.labels import Label, labels
from harness.analysis.moves import transfers
from harness.ledger.categories import CATEGORIES
from harness.record.memory import UNHEARD, Rank
from harness.record.places import as_path, runs_in
from harness.record.record_file import read
from harness.record.schema import Failure, Record, parse
from harness.tables import AT_LEAST, Table, difference, escaped, factor, size, tail

WIDTH = 100
NAME = 24
"""The longest name in a heading, so that two runs fit in `WIDTH`."""


class Run(NamedTuple):
    """A record and its path."""

    path: Path
    record: Record


@dataclass(frozen=True)
class Row:
    """A figure of every run in bytes, each with a prefix. A prefix of None means an empty cell."""

    name: str
    figures: Sequence[int | None]
    prefixes: Sequence[str | None]

    @classmethod
    def of(cls, name: str, figures: Sequence[int | None]) -> "Row":
        """A row with empty prefixes."""
        return cls(name, figures, [""] * len(figures))

    def cells(self, exact: bool) -> list[str]:
        """The figures as text."""
        pairs = zip(self.prefixes, self.figures, strict=True)
        return ["" if prefix is None else f"{prefix}{size(figure, exact)}" for prefix, figure in pairs]

    def apart(self, index: int, exact: bool) -> tuple[str, str]:
        """The difference and factor from the first run to run `index`; "-" where only one figure is a lower bound."""
        pair = self.figures[0], self.figures[index]
        if None in (self.prefixes[0], self.prefixes[index]):
            return "", ""
        if (self.prefixes[0] == AT_LEAST) != (self.prefixes[index] == AT_LEAST):
            pair = None, None
        return difference(*pair, exact), factor(*pair)


def main(argv: Sequence[str]) -> int:
    """Run `harness compare RUN RUN [...]`; returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        if len(options.run) < 2:
            raise ValueError("compare: there is nothing to compare with; name two runs or more")
        runs = [_run(path) for path in options.run]
    except ValueError as error:
        return refuse(error)
    if options.json:
        print(json.dumps(as_json(runs), indent=1))
    else:
        print(table(runs, markdown=options.markdown, exact=options.bytes))
    return 0


def _parser() -> Parser:
    parser = Parser(
        "compare",
        description="Compare runs, of one mode or of both: what used the memory at the peak of each.",
        epilog="A failed run is compared as far as it came. Exit code 2: a run has no record that can be read.",
    )
    parser.takes_runs("*")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="exact bytes as JSON; null: not measured")
    form.add_argument("--markdown", action="store_true", help="a Markdown table, for a page or an issue")
    parser.add_argument("--bytes", action="store_true", help="exact bytes in the table")
    return parser


def _run(path: Path) -> Run:
    return Run(path, parse(read(path), str(path)))


def compare(*paths: str | Path, markdown: bool = False, exact: bool = False) -> str:
    """`harness compare` as a function: the runs at `paths` side by side, as text; with `exact` in exact bytes.

    Raises ValueError for a path without a readable record.
    """
    return table([_run(run) for path in paths for run in runs_in(as_path(path))], markdown, exact)


def table(runs: Sequence[Run], markdown: bool = False, exact: bool = False) -> str:
    """The runs as one table, each compared with the first; then sentences about what changed the most."""
    records = [run.record for run in runs]
    named = labels([run.path for run in runs], records)
    names = [label.text for label in named]
    two, at_peak = len(runs) == 2, [*_at_peak(records)]
    sections = {
        "at the peak of the worst rank": at_peak,
        "each category's own peak, whenever that was": [*_own_peaks(records)],
        _ranks_title(records): [*(_stages(records) if _any_pipeline(records) else _ranks(records))],
        "what the rank that moves most moves in a step, or a batch": [*_traffic(records)],
    }
    lines = Table(*map(_heading, records, named), *([["difference"], ["factor"]] if two else []))
    for title, rows in sections.items():
        if rows:
            lines.section(title)
        for row in rows:
            if row.name == "total":
                lines.rule()
            lines.row(f"  {row.name}", *row.cells(exact), *(row.apart(1, exact) if two else ()))
    if not two:
        lines.section(f"at the peak of the worst rank, against {names[0]}")
        for row in at_peak:
            others = (row.apart(index, exact) for index in range(1, len(runs)))
            lines.row(f"  {row.name}", "", *("  ".join(filter(None, cells)) for cells in others))
    notes = [
        *_empty_notes(records),
        *lines.legend(),
        *failures(records, names),
        *_change_notes(records, names, exact),
    ]
    if markdown:
        return "\n\n".join([lines.markdown(), *map(escaped, notes)])
    return "\n".join([lines.text(), "", *(fill(note, WIDTH) for note in notes)])


def _heading(record: Record, label: Label) -> list[str]:
    """The lines over a run's column: what it is, and below it the settings in which it differs from similar runs."""
    world, model = record.world, record.model
    said = f"world={world.kind}" in label.settings
    mode = f"{record.mode}, rehearsed" if world.rehearsed and not said else record.mode
    lines = [mode, model.short, *label.settings, f"{world.devices}, {model.computes}"]
    return [tail(line, NAME) for line in lines]


def _categories(records: Sequence[Record]) -> list[str]:
    """Every known category in a fixed order, then unknown ones from other versions, then `kernel`."""
    names = {name for r in records for name in (*r.worst.peak.categories, *r.worst.highest)}
    return [*CATEGORIES, *sorted(names - {*CATEGORIES, "kernel"}), "kernel"]


def _at_peak(records: Sequence[Record]) -> Iterator[Row]:
    folded = {name for names in _empty_categories(records).values() for name in names}
    peaks, allocators = [r.worst.peak for r in records], [r.worst.allocator for r in records]
    for name in _categories(records):
        if name not in folded:
            yield Row.of(name, [peak.categories.get(name) for peak in peaks])
            if name == "activations":
                yield Row.of("  saved for backward", [peak.saved for peak in peaks])
                if any(peak.recomputed for peak in peaks):
                    yield Row.of("  recomputed in backward", [peak.recomputed for peak in peaks])
    yield Row.of("total", [peak.bytes for peak in peaks])
    yield Row.of("allocator's own peak", [each.peak for each in allocators])
    yield Row.of("unattributed", [each.unattributed for each in allocators])
    if any(each.reserved is not None for each in allocators):
        yield Row.of("allocated, in blocks", [peak.allocated for peak in peaks])
        yield Row.of("reserved, in segments", [each.reserved for each in allocators])
        yield Row.of("slack, reserved then", [each.slack for each in allocators])
    if any(record.worst.on_host for record in records):
        yield Row.of("activations on the host", [_on_host(record.worst, "activations") for record in records])
        yield Row.of("  pinned for them", [_on_host(record.worst, "pinned") for record in records])
    if any(each.foreign for each in allocators):
        yield Row.of("foreign, in no figure", [each.foreign for each in allocators])


def _on_host(rank: Rank, name: Literal["activations", "pinned"]) -> int | None:
    """The most bytes that waited on the host, or were pinned for them; 0 where nothing did. None: not measured."""
    if rank.on_host is not None:
        return rank.on_host.activations if name == "activations" else rank.on_host.pinned
    return None if rank.peak.bytes is None else 0


def _empty_categories(records: Sequence[Record]) -> dict[int | None, list[str]]:
    """The categories that are 0 at every peak (key 0), and those that no run measured (key None)."""
    folded: dict[int | None, list[str]] = {0: [], None: []}
    for name in _categories(records)[:-1]:  # kernel is always shown
        for same, names in folded.items():
            if all(record.worst.peak.categories.get(name) == same for record in records):
                names.append(name)
    return folded


def _empty_notes(records: Sequence[Record]) -> list[str]:
    meanings = {0: "0 B at these peaks", None: "not measured at these peaks"}
    return [
        f"{meanings[same]}: {', '.join(names)}" for same, names in _empty_categories(records).items() if names
    ]


def _own_peaks(records: Sequence[Record]) -> Iterator[Row]:
    for name in _categories(records):
        tops = [(record.worst.highest.get(name), record.worst.seen.get(name)) for record in records]
        is_lower_bound = [(seen or 0) > (top or 0) for top, seen in tops]
        figures = [
            seen if lower_bound else top
            for lower_bound, (top, seen) in zip(is_lower_bound, tops, strict=True)
        ]
        if any(figures):
            yield Row(name, figures, [AT_LEAST if lower_bound else "" for lower_bound in is_lower_bound])


def _any_pipeline(records: Sequence[Record]) -> bool:
    return any(record.pipeline.stages > 1 for record in records)


def _ranks_title(records: Sequence[Record]) -> str:
    return "the peak of each stage's worst rank" if _any_pipeline(records) else "each rank's peak"


def _stages(records: Sequence[Record]) -> Iterator[Row]:
    """Two rows for each stage: its peak, and the number and bytes of the forwards that wait for their backward."""
    for stage in sorted({stage for record in records for stage in record.by_stage}):
        ranks = [record.by_stage.get(stage, UNHEARD) for record in records]
        prefixes = [
            _prefix(record, rank.rank) if rank is not UNHEARD else None
            for record, rank in zip(records, ranks, strict=True)
        ]
        yield Row(f"stage {stage}", [rank.peak.bytes for rank in ranks], prefixes)
        waiting = [
            (rank.forwards.alive, rank.forwards.bytes) if rank.forwards else (None, None) for rank in ranks
        ]
        alive = ["" if number is None else f"{number}: " for number, _ in waiting]
        prefixes = [
            None if prefix is None else number for prefix, number in zip(prefixes, alive, strict=True)
        ]
        yield Row("  forwards alive", [bytes_ for _, bytes_ in waiting], prefixes)


def _ranks(records: Sequence[Record]) -> Iterator[Row]:
    """A row for each rank, or for consecutive ranks with equal cells in every run."""
    numbers = sorted({number for record in records for number in record.peaks})

    def alike(place: tuple[int, int]) -> tuple[int, list[tuple[int | None, str | None]]]:
        index, number = place
        return number - index, [(record.peaks.get(number), _prefix(record, number)) for record in records]

    for (_, cells), group in groupby(enumerate(numbers), alike):
        places = [number for _, number in group]
        name = f"rank {places[0]}" if len(places) == 1 else f"ranks {places[0]} to {places[-1]}"
        yield Row(name, [peak for peak, _ in cells], [prefix for _, prefix in cells])


def _prefix(record: Record, number: int) -> str | None:
    """The prefix of a rank's peak; None where the run has no such rank."""
    if number not in record.peaks and number >= record.world.size:
        return None
    return "worst " if number in record.worst.numbers and len(set(record.peaks.values())) > 1 else ""


def _traffic(records: Sequence[Record]) -> Iterator[Row]:
    """A row for each link, and the sum; none where a run has no traffic."""
    moved = [_moved(record) for record in records]
    known = [links for links in moved if links is not None]
    if len(known) == len(records):
        for link in dict.fromkeys(link for links in known for link in links):
            yield Row.of(link, [links.get(link, 0) for links in known])
        yield Row.of("all links", [sum(links.values()) for links in known])


def _moved(record: Record) -> dict[str, int] | None:
    """Payload bytes by link of a step or a batch. None: not counted."""
    moved = transfers.worst(record)
    if moved is None or transfers.gaps(moved.rank):  # a part of it would be compared
        return None
    return transfers.by_link(moved.rows)


def failures(records: Sequence[Record], names: Sequence[str]) -> Iterator[str]:
    """A sentence for each failed run: where it failed, the error, and how many ranks left a record."""
    for record, name in zip(records, names, strict=True):
        if record.status == "failed":
            failure = record.failure or Failure()
            rank = "" if failure.rank is None else f" on rank {failure.rank}"
            rank += "" if failure.stage is None else f", stage {failure.stage},"
            where = "" if failure.where is None else f" in step {failure.where.step}, {failure.where.phase}"
            yield f"{name} failed{rank}{where}: {failure.error or 'its record does not say why'}"
            if len(record.peaks) < record.world.size:
                yield f"{name} has the accounting of {len(record.peaks)} of its {record.world.size} ranks"


def _change_notes(records: Sequence[Record], names: Sequence[str], exact: bool) -> Iterator[str]:
    for other, name in zip(records[1:], names[1:], strict=True):
        yield _sentence(records[0], names[0], other, name, exact)
        yield from grew(records[0], names[0], other, name)


def _sentence(first: Record, first_name: str, other: Record, other_name: str, exact: bool) -> str:
    """What changed the most from `first` to `other`."""
    before, after = first.worst.peak.bytes, other.worst.peak.bytes
    if before is None or after is None:
        unknown = first_name if before is None else other_name
        return f"The peak of {unknown} was not measured, so what changed the most is not known."
    changes = _changes(first, other)
    name = max(changes, key=lambda name: abs(changes[name] or 0), default="")
    change = changes.get(name)
    if not change:
        return f"At its peak {other_name} holds what {first_name} does, in every category."
    moved = f"{name} {'grew' if change > 0 else 'shrank'} the most, by {size(abs(change), exact)}"
    if before == after:
        return f"At its peak {other_name} holds as much as {first_name}; {moved}."
    less = f"{size(abs(after - before), exact)} {'more' if after > before else 'less'}"
    sizes = f"{size(after, exact)}, not {size(before, exact)}"
    return f"At its peak {other_name} holds {less} than {first_name} ({sizes}): {moved}."


def _changes(first: Record, other: Record) -> dict[str, int | None]:
    """The change in bytes by category, from one peak to the other. None: not measured in both runs."""
    before, after = first.worst.peak.categories, other.worst.peak.categories
    return {name: _change(before.get(name), after.get(name)) for name in _categories([first, other])}


def _change(first: int | None, other: int | None) -> int | None:
    return None if first is None or other is None else other - first


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The comparison as plain data, in exact bytes; None for what was not measured."""
    first = runs[0].record.worst.peak
    named = labels([run.path for run in runs], [run.record for run in runs])
    documents = []
    for (path, record), label in zip(runs, named, strict=True):
        worst = record.worst
        documents.append(
            {
                "run": str(path),
                "name": label.text,
                **record.model_dump(include={"status", "mode", "model", "world", "failure"}),
                "worst_rank": worst.rank if record.ranks else None,
                "peak": worst.peak.model_dump(),
                "difference": {
                    "bytes": _change(first.bytes, worst.peak.bytes),
                    "saved": _change(first.saved, worst.peak.saved),
                    "recomputed": _change(first.recomputed, worst.peak.recomputed),
                    "categories": _changes(runs[0].record, record),
                },
                "highest": dict(worst.highest),
                "at_least": dict(worst.seen),
                "ranks": [{"rank": number, "peak": peak} for number, peak in record.peaks.items()],
                "allocator": worst.allocator.model_dump(),
                "on_host": None if worst.on_host is None else worst.on_host.model_dump(),
                "traffic": _moved(record),
            }
        )
    return {"runs": documents}
