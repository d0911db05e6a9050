"""`harness contrast RUN RUN [...]`: a stage's activations by the number of stages, in training and in inference."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from harness.analysis.args import Parser, refuse
from harness.analysis.labels import Label, labels
from harness.record.record_file import read
from harness.record.schema import Record, parse
from harness.tables import Table, factor, size

WIDTH = 24
"""Characters of the longest bar."""

SAID = ("pipeline.stages=", "world=")
"""Beginnings of the settings that a row says in its own words."""


class Point(NamedTuple):
    """A run's figures about its stages. `activations` is the highest peak of activations on any rank, in bytes. `kept`
    is the bytes of the forwards that wait for their backward, `alive` their number. None: not measured. `name` is the
    run's, with the `settings` in which it differs from others of its mode."""

    mode: str
    dtype: str | None
    stages: int
    layers: int | None  # of the largest stage; None: all
    rehearsed: bool
    activations: int | None
    alive: int | None
    kept: int | None
    name: str = ""
    settings: tuple[str, ...] = ()

    @property
    def row(self) -> tuple[object, ...]:
        """Points with an equal row differ in nothing that the table's first columns say."""
        return self.mode, self.dtype, self.stages, self.layers, self.rehearsed


def main(argv: Sequence[str]) -> int:
    """Run `harness contrast RUN RUN [...]`; returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        records = [parse(read(path), str(path)) for path in options.run]
        if len(records) < 2:
            raise ValueError("contrast: there is nothing to contrast; name two runs or more")
        named = labels(options.run, records)
        points = sorted(map(point, records, named), key=lambda each: (each.mode != "train", each.stages))
    except ValueError as error:
        return refuse(error)
    print(json.dumps([each._asdict() for each in points], indent=1) if options.json else text(points))
    return 0


def _parser() -> Parser:
    parser = Parser(
        "contrast",
        description="Draw what activations the worst rank of each run keeps, by its number of pipeline stages.",
        epilog="launch/pipeline-contrast makes such runs. Exit code 2: a run has no record that can be read.",
    )
    parser.takes_runs("*")
    parser.add_argument("--json", action="store_true", help="the same as JSON; null: not measured")
    return parser


def point(record: Record, label: Label) -> Point:
    """The figures of `record`: the highest of any rank."""
    measured = [rank.forwards for rank in record.ranks if rank.forwards is not None]
    peaks = [rank.highest.get("activations") for rank in record.ranks]
    return Point(
        record.mode,
        record.model.multiplied or None,
        record.pipeline.stages,
        max(record.pipeline.split, default=None),
        record.world.rehearsed,
        max((peak for peak in peaks if peak is not None), default=None),
        max((each.alive for each in measured), default=None),
        max((each.bytes for each in measured), default=None),
        label.text,
        label.settings,
    )


def text(points: Sequence[Point]) -> str:
    """A table of each mode with bars of one scale, and sentences about it."""
    highest = max((each.activations or 0 for each in points), default=0)
    times = Counter(each.row for each in points)
    table = Table(
        ["layers", "a stage"],
        ["forwards", "alive"],
        ["kept for", "backward"],
        ["activations", "at most"],
        [""],
    )
    for kind in dict.fromkeys((each.mode, each.dtype) for each in points):
        table.section(f"{', '.join(filter(None, kind))}: the worst rank")
        for each in points:
            if (each.mode, each.dtype) == kind:
                table.row(*_cells(each, highest, times[each.row] > 1))
    return "\n".join([table.text(), *map("\n{}".format, _sentences(points))])


def _cells(each: Point, highest: int, repeated: bool) -> Iterator[str]:
    """A row's cells; `repeated`: others have as many stages, so that it needs its settings too."""
    stages = f"{each.stages} stage{'s' * (each.stages > 1)}{', rehearsed' * each.rehearsed}"
    others = [setting for setting in each.settings if not setting.startswith(SAID)] if repeated else []
    yield f"  {', '.join([stages, *others])}"
    yield "all" if each.stages == 1 else str(each.layers)
    yield "-" if each.alive is None else str(each.alive)
    yield size(each.kept)
    yield size(each.activations)
    length = round(WIDTH * (each.activations or 0) / highest) if highest else 0
    yield ("#" * length or "." * bool(each.activations)).ljust(WIDTH)


def _sentences(points: Sequence[Point]) -> Iterator[str]:
    """A sentence for each mode: how its run with the fewest stages differs from that with the most."""
    for mode in dict.fromkeys(each.mode for each in points):
        of_mode = [each for each in points if each.mode == mode]
        few, many = of_mode[0], of_mode[-1]
        if few.stages < many.stages and many.kept is not None and few.kept is not None:
            times = factor(few.kept, many.kept)
            kept_text = (
                f"{size(few.kept)}, then {size(many.kept)}{f' ({times})' if times else ''}"
                if many.kept
                else "nothing"
            )
            yield f"{mode}: from {few.stages} to {many.stages} stages the worst rank keeps {kept_text} for backward."
