"""What moves: the payload of a step, a batch and a token by link, and each operation of its phases and groups."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from harness.analysis.bars import Bar, present, stacked
from harness.analysis.moves import transfers
from harness.record.fields import printable
from harness.record.memory import Transfer
from harness.record.schema import Record
from harness.report.content import ReportedRun
from harness.tables import count, size

LARGEST = 5
"""How many names are said of what most moves for."""

UNITS = {"train": "step", "infer": "batch"}
"""What the figures are of, by mode."""


class Row(NamedTuple):
    """An operation in a phase, in all micro-batches, among the ranks of a group over a link; bytes.

    None: not known, or a library does not do it so.
    """

    phase: str
    operation: str
    group: str
    link: str
    calls: int
    payload: int
    by_ring: int | None
    by_tree: int | None


def moves(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    """What each run moves, as plain data; its bars have one scale."""
    found = [(run, transfers.worst(run.record)) for run in runs]
    lines = [line for run, each in found if each is not None for line in _lines(run, each)]
    scale = max((total for *_, total in lines), default=0)
    return {
        "links": present([links for _, _, links, _ in lines]),
        "bars": [
            {"name": name, "of": unit, "bar": _bar(links, total, scale)} for name, unit, links, total in lines
        ],
        "runs": [_told(run, each) for run, each in found if each is not None],
        "headings": HEADINGS,
        "tokens": any(of == "a token" for _, of, *_ in lines),
        "absent": [absent(run) for run, each in found if each is None],
    }


def absent(run: ReportedRun) -> str:
    """Why nothing is said of a run."""
    return printable(f"{run.name}: its record has no traffic; {transfers.missing(run.record)}.")


def _lines(run: ReportedRun, each: transfers.Moved) -> Iterator[tuple[str, str, dict[str, int | None], int]]:
    """The bars of a run: its name, what they are of, and the payload by link and in all."""
    links: dict[str, int | None] = {**transfers.by_link(each.rows)}
    yield run.name, f"a {unit(run.record)}", links, each.bytes
    token = transfers.of_token(run.record, *each)
    if token is not None:
        whole: dict[str, int | None] = {link: round(nbytes) for link, nbytes in token.items()}
        yield run.name, "a token", whole, sum(nbytes or 0 for nbytes in whole.values())


def unit(record: Record) -> str:
    """What the figures of a run are of."""
    return UNITS.get(record.mode, "step")


def _bar(links: dict[str, int | None], total: int, scale: int) -> Bar:
    drawn = stacked(links, total, scale)
    return drawn if total else drawn._replace(told="nothing moves")


def _told(run: ReportedRun, each: transfers.Moved) -> dict[str, Any]:
    record, rank = run.record, each.rank
    among = f" of {record.world.size:,}, which moves most" if record.world.size > 1 else ""
    return {
        "name": run.name,
        "of": f"In its last {unit(record)}, rank {rank.rank}{among}.",
        "rows": [cells(row) for row in rows(each.rows)],
        "largest": largest(each.rows),
        "assumed": assumed(record),
    }


def assumed(record: Record) -> str:
    """Where the borders of the nodes are, if nobody said it."""
    said = record.resolved.get("world.per_node", "")
    return f"world.per_node={said}" if "assumed" in said else ""


def rows(moved: Sequence[Transfer]) -> list[Row]:
    """A row for each phase, operation, group and link, in the order in which they first come."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for each in moved:
        ranks = f"{each.group} ({each.ranks:,} rank{'s' * (each.ranks != 1)})" if each.group else "-"
        key = each.phase, each.operation, ranks, each.link or transfers.UNKNOWN
        old = found.get(key, Row(*key, 0, 0, 0, 0))
        wire = [transfers.plus(*pair) for pair in ((old.by_ring, each.by_ring), (old.by_tree, each.by_tree))]
        found[key] = Row(*key, old.calls + each.calls, old.payload + each.bytes, *wire)
    return list(found.values())


def largest(moved: Sequence[Transfer]) -> list[str]:
    """The names for which most moves, each with its bytes and its share of the payload."""
    total = sum(each.bytes for each in moved)
    found = transfers.largest(moved, LARGEST)
    return [f"{name}: {size(nbytes)}, {nbytes / total:.0%}" for name, nbytes in found if total]


HEADINGS = ("phase", "operation", "group", "link", "calls", "payload", "by ring", "by tree")
"""The columns of a row."""


def cells(row: Row) -> list[str]:
    """A row as text, below `HEADINGS`; "-" where nothing is known."""
    figures = [size(each) for each in (row.payload, row.by_ring, row.by_tree)]
    return [row.phase, row.operation, row.group, row.link, called(row.calls), *figures]


def called(calls: int) -> str:
    """A number of calls as text."""
    return f"{calls:,}" if calls < 10**9 else count(calls)
