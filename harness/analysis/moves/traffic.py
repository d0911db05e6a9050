"""`harness traffic RUN [RUN ...]`: what a step, a batch and a token move, by link and phase. It imports no torch."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from harness.analysis.args import Parser, refuse
from harness.analysis.labels import labels
from harness.analysis.moves import transfers
from harness.analysis.moves.transfers import Flow
from harness.record.fields import printable
from harness.record.memory import Rank, Transfer
from harness.record.record_file import read
from harness.record.schema import Record, parse
from harness.tables import Table, size, tail

WIDTH = 120
LARGEST = 3
"""How many names are said of what most moves for."""
HEADING = 24
"""The longest line over a run's column."""

PER_NODE = "world.per_node"

PAYLOAD = (
    "Payload is the whole tensor that an all-gather fills or a reduce-scatter takes, and the tensor of every other "
    "operation. By ring and by tree: what the rank sends at least if a library does it so; empty where none does."
)
TOKEN = "A token: what a decode's forward pass moves for one token of every sequence of a batch; prefill is not in it."


class Counted(NamedTuple):
    """A run whose traffic was counted: its rank that moves most, and what that moves in its last step or batch."""

    name: str
    record: Record
    rank: Rank
    moved: list[Transfer]

    @property
    def path(self) -> str:
        """Where the run is, in printable characters."""
        return self.name

    @property
    def unit(self) -> str:
        """What `moved` is of."""
        return "batch" if self.record.mode == "infer" else "step"

    @property
    def token(self) -> dict[str, float] | None:
        """`transfers.of_token` of the run."""
        return transfers.of_token(self.record, self.rank, self.moved)


class Uncounted(NamedTuple):
    """A run whose traffic was not counted, and why."""

    name: str
    record: Record
    why: str


def main(argv: Sequence[str]) -> int:
    """Run `harness traffic RUN [RUN ...]`; returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        runs = [of(path, parse(read(path), str(path))) for path in options.run]
        if all(isinstance(run, Uncounted) for run in runs):
            raise ValueError("; ".join(_sentence(run) for run in runs if isinstance(run, Uncounted)))
        if options.chakra is not None:
            from harness.analysis.moves.chakra import chakra  # protobuf takes a while

            for place in chakra([run for run in runs if isinstance(run, Counted)], options.chakra):
                print(f"chakra: {place}", file=sys.stderr)
    except ValueError as error:
        return refuse(error)
    except OSError as error:
        return refuse(ValueError(f"--chakra {error.filename}: it cannot be written: {error.strerror}"))
    if options.json:
        print(json.dumps([as_json(run) for run in runs], indent=1))
    else:
        print("\n\n".join(text(options.run, runs)))
    return 0


def _parser() -> Parser:
    parser = Parser(
        "traffic",
        description="Say what a training step, or a batch and a token of inference, moves over each link: its calls, "
        "its payload and the bytes on the wire; what moves outside of steps; and what most of it is for.",
        epilog="Exit code 2: a run has no record that can be read, or no run has its traffic counted.",
    )
    parser.takes_runs("+", "; several are also set side by side")
    parser.add_argument("--json", action="store_true", help="the same in bytes, as JSON; null: not counted")
    parser.takes_place(
        "--chakra",
        metavar="DIR",
        help="write DIR/chakra too: a step as Chakra's execution traces, for ASTRA-sim (harness[chakra])",
    )
    return parser


def of(path: Path, record: Record) -> Counted | Uncounted:
    """What the run at `path` moves."""
    name, moved = printable(str(path)), transfers.worst(record)
    if moved is None:
        return Uncounted(name, record, transfers.missing(record))
    return Counted(name, record, *moved)


def _sentence(run: Uncounted) -> str:
    return f"{run.name}: its record has no traffic; {run.why}"


def as_json(run: Counted | Uncounted) -> dict[str, Any]:
    """What a run moves, in bytes, as plain data."""
    head: dict[str, Any] = {"run": run.name, "mode": run.record.mode}
    if isinstance(run, Uncounted):
        return {**head, "traffic": None, "why": run.why}
    record, rank, token = run.record, run.rank, run.token
    traffic = {
        "of": run.unit,
        "rank": rank.rank,
        "links": transfers.by_link(run.moved),
        "rows": [flow._asdict() for flow in transfers.flows(run.moved)],
        "token": None if token is None else {"passes": transfers.passes(record, rank), "links": token},
        "largest": [
            {"name": name, "bytes": nbytes} for name, nbytes in transfers.largest(run.moved, LARGEST)
        ],
        "unnamed": transfers.unnamed(run.moved),
        "outside": transfers.outside(record, rank),
        "per_node": record.resolved.get(PER_NODE),
        "gaps": transfers.gaps(rank),
    }
    return {**head, "traffic": traffic, "why": None}


def text(paths: Sequence[Path], runs: Sequence[Counted | Uncounted]) -> Iterator[str]:
    """A table and sentences for each run, then all of them side by side; at the end, once, notes about the figures."""
    for run in runs:
        yield _sentence(run) if isinstance(run, Uncounted) else "\n".join(_lines(run))
    counted = [(path, run) for path, run in zip(paths, runs, strict=True) if isinstance(run, Counted)]
    if len(counted) > 1:
        yield _beside([path for path, _ in counted], [run for _, run in counted]).text()
    notes = [PAYLOAD, *([TOKEN] if any(run.token for _, run in counted) else [])]
    yield "\n".join(fill(note, WIDTH) for note in notes)


def _lines(run: Counted) -> Iterator[str]:
    yield f"{run.name}: {run.record.heading}"
    yield _table(run).text()
    yield from (fill(line, WIDTH) for line in _causes(run))
    for phase, links in (transfers.outside(run.record, run.rank) or {}).items():
        yield f"outside of a {run.unit}, {phase}: {_links_text(links)}"
    assumed = run.record.resolved.get(PER_NODE, "")
    if "assumed" in assumed:
        yield f"{PER_NODE}={assumed}"
    yield from (fill(f"not counted: {sentence}", WIDTH) for sentence in transfers.gaps(run.rank))


def _causes(run: Counted) -> Iterator[str]:
    """What most of it is for, and how much has no name."""
    named, rest = transfers.largest(run.moved, LARGEST), transfers.unnamed(run.moved)
    nameless = f"for {size(rest)} of a {run.unit} no name was seen"
    if named and named[0][1] >= rest:
        parts = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in named)
        yield f"a {run.unit} moves most for {parts}" + f"; {nameless}" * (rest > 0)
    elif rest > 0:
        yield nameless


def _links_text(links: dict[str, int]) -> str:
    return ", ".join(f"{link} {size(nbytes)}" for link, nbytes in sorted(links.items()))


def _table(run: Counted) -> Table:
    """A row for each link, and below it for each operation of a phase; then what a token moves."""
    table = Table(["calls"], ["payload"], ["by ring"], ["by tree"])
    ranks = f" of {run.record.world.size}, which moves most" if run.record.world.size > 1 else ""
    table.section(f"a {run.unit} of rank {run.rank.rank}{ranks}")
    link = None
    for flow in transfers.flows(run.moved):
        if flow.link != link:
            link = flow.link
            same = [each for each in run.moved if (each.link or transfers.UNKNOWN) == link]
            table.row(
                f"  {link}", f"{sum(each.calls for each in same):,}", size(sum(each.bytes for each in same))
            )
        table.row(f"    {flow.phase}, {flow.operation}", *_figures(flow))
    table.rule()
    table.row(
        "  total",
        f"{sum(each.calls for each in run.moved):,}",
        size(sum(each.bytes for each in run.moved)),
    )
    if run.token:
        table.section(f"a token, of {transfers.passes(run.record, run.rank):,} by decode")
        for name, nbytes in run.token.items():
            table.row(f"  {name}", "", size(nbytes))
    return table


def _figures(flow: Flow) -> Iterator[str]:
    yield f"{flow.calls:,}"
    yield size(flow.bytes)
    yield from ("" if sent is None else size(sent) for sent in (flow.by_ring, flow.by_tree))


def _beside(paths: Sequence[Path], runs: Sequence[Counted]) -> Table:
    """The runs side by side: what a step or a batch moves over each link, and a token."""
    named = labels(paths, [run.record for run in runs])
    table = Table(*([tail(line, HEADING) for line in (label.title, *label.settings)] for label in named))
    for title, columns in (
        ("a step, or a batch", [transfers.by_link(run.moved) for run in runs]),
        ("a token", [run.token for run in runs]),
    ):
        links = dict.fromkeys(link for column in columns for link in column or ())
        if links:
            table.section(title)
        for link in links:
            cells = ("" if column is None else size(column.get(link, 0)) for column in columns)
            table.row(f"  {link}", *cells)
    return table
