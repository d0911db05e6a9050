"""What a run moves in a step or a batch, by link and phase, read from its record. It imports no torch."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from harness.analysis.speed.roofline_model import PHASES
from harness.record.memory import Phase, Rank, Transfer
from harness.record.schema import Record

UNKNOWN = "unknown"
"""The link of a transfer whose link is not known: the record does not say where its ranks are."""

GAPS = (
    "traffic",
    "what ranks send each other",
    "is compiled:",
)
"""What the sentences of a ledger's gaps say where something that moved is not counted."""


class Flow(NamedTuple):
    """What an operation moved over a link in a phase: the figures of a `Transfer`, of several groups together.

    `by_ring` and `by_tree` are None where they are not known of each.
    """

    link: str
    phase: str
    operation: str
    calls: int
    bytes: int
    by_ring: int | None
    by_tree: int | None


def of_step(record: Record, rank: Rank) -> list[Transfer] | None:
    """What `rank` moves in the last training step, or the last batch of inference, that its ledger saw exactly.

    Set-up, validation and checkpoints are no part of it. If no step was seen exactly, each phase is taken as it was
    recorded last: a ledger that sums owners records a phase again only where something else moved. None: traffic was
    not counted.
    """
    if rank.traffic is None:
        return None
    names = _names(record.mode)
    exact = [each.step for each in rank.phases if each.phase in names and each.peak is not None]
    return of_last(rank.traffic, record.mode, exact)


def _names(mode: str) -> tuple[str, ...]:
    """The phases of a step or a batch."""
    return "data", *PHASES.get(mode, ())


def of_last(traffic: Iterable[Transfer], mode: str, exact: Sequence[int]) -> list[Transfer]:
    """What moves in the last of the `exact` steps; without one, in each phase as it was recorded last."""
    names = _names(mode)
    rows = [each for each in traffic if each.phase in names]
    if exact:
        return [each for each in rows if each.step == max(exact)]
    last = {(each.phase, each.micro_batch): each.step for each in rows}
    return [each for each in rows if each.calls and last[each.phase, each.micro_batch] == each.step]


def phases_of_step(record: Record, rank: Rank) -> list[Phase]:
    """The phases of `rank` in the step of `of_step`, in their order, also those in which nothing moves."""
    names = _names(record.mode)
    phases = [each for each in rank.phases if each.phase in names]
    exact = [each.step for each in phases if each.peak is not None]
    if exact:
        return [each for each in phases if each.step == max(exact)]
    last = {(each.phase, each.micro_batch): each for each in phases}
    return list(last.values())


def beside(record: Record, rank: Rank) -> list[Transfer] | None:
    """What `rank` moves outside of steps and batches: in set-up, validation and checkpoints. None: not counted."""
    names = _names(record.mode)
    if rank.traffic is None:
        return None
    return [each for each in rank.traffic if each.calls and each.phase not in names]


def by_link(transfers: Iterable[Transfer]) -> dict[str, int]:
    """Payload bytes by link."""
    totals: Counter[str] = Counter()
    for each in transfers:
        totals[each.link or UNKNOWN] += each.bytes
    return dict(totals)


class Moved(NamedTuple):
    """What `rank` moves in a step: its `rows`."""

    rank: Rank
    rows: list[Transfer]

    @property
    def bytes(self) -> int:
        """The payload of all rows."""
        return sum(row.bytes for row in self.rows)


def worst(record: Record) -> Moved | None:
    """What the rank moves that moves most in a step. None: no rank has its traffic counted."""
    steps = ((rank, of_step(record, rank)) for rank in record.ranks)
    counted = [Moved(rank, rows) for rank, rows in steps if rows is not None]
    return max(counted, key=lambda moved: (moved.bytes, -moved.rank.rank), default=None)


def of_token(record: Record, rank: Rank, rows: Iterable[Transfer]) -> dict[str, float] | None:
    """Payload bytes by link of a token, of the `rows` of a batch: of a forward pass of the decode. None: no pass was
    counted.
    """
    number = passes(record, rank)
    decode = by_link(each for each in rows if each.phase == "decode")
    return None if number is None else {link: nbytes / number for link, nbytes in decode.items()}


def flows(transfers: Iterable[Transfer]) -> list[Flow]:
    """The transfers summed by link, phase and operation; the links that most moves over first."""
    sums: dict[tuple[str, str, str], Flow] = {}
    totals: Counter[str] = Counter()
    for each in transfers:
        link = each.link or UNKNOWN
        totals[link] += each.bytes
        key = link, each.phase, each.operation
        old = sums.get(key, Flow(*key, 0, 0, 0, 0))
        wire = plus(old.by_ring, each.by_ring), plus(old.by_tree, each.by_tree)
        sums[key] = Flow(*key, old.calls + each.calls, old.bytes + each.bytes, *wire)
    return sorted(sums.values(), key=lambda flow: (-totals[flow.link], flow.link))


def plus(first: int | None, second: int | None) -> int | None:
    """The sum. None where one of them is."""
    return None if first is None or second is None else first + second


def passes(record: Record, rank: Rank) -> int | None:
    """The forward passes of a decode of the last batch that was seen exactly: each gives a token of every sequence.

    None: there was none, or nothing counted them.
    """
    return decoding_steps(rank) if record.mode == "infer" else None


def decoding_steps(rank: Rank) -> int | None:
    """The decoding steps of the last batch that was counted. None: not known."""
    decoded = [each for each in rank.phases if each.phase == "decode" and each.passes]
    last = max((each.step for each in decoded), default=0)
    return max((each.passes or 0 for each in decoded if each.step == last), default=None)


def outside(record: Record, rank: Rank) -> dict[str, dict[str, int]] | None:
    """Payload bytes by link of each phase outside of steps; of one that comes again, the most at once."""
    rows = beside(record, rank)
    if rows is None:
        return None
    each_time: dict[tuple[str, int], list[Transfer]] = {}
    for row in rows:
        each_time.setdefault((row.phase, row.step), []).append(row)
    most: dict[str, dict[str, int]] = {}
    for (phase, _), moved in each_time.items():
        most[phase] = max(most.get(phase, {}), by_link(moved), key=lambda links: sum(links.values()))
    return most


def gaps(rank: Rank) -> list[str]:
    """The sentences that say what moved and is not counted."""
    return [sentence for sentence in rank.unseen if any(words in sentence for words in GAPS)]


def missing(record: Record) -> str:
    """Why a record has no traffic, as the end of a sentence."""
    if record.value("ledger.mode") == "off":
        return "ledger=off counts none"
    if not record.ranks:
        return "none of its ranks left its figures"
    if any("traffic" in rank.model_fields_set for rank in record.ranks):
        sentences = [sentence for rank in record.ranks for sentence in rank.unseen]
        return f"nothing counted it: {sentences[0]}" if sentences else "nothing counted it"
    return "a run of this version counts it"


def members(group: str) -> Sequence[int]:
    """The ranks of a transfer's `group`: `0-7`, `0-56:8` or `0,3,4`. Raises ValueError for another text."""
    if not group:
        return ()
    listed = re.fullmatch(r"\d{1,7}(,\d{1,7})*", group, re.ASCII)
    spanned = re.fullmatch(r"(\d{1,7})-(\d{1,7})(?::([1-9]\d{0,6}))?", group, re.ASCII)
    if spanned:
        first, last, step = (int(each or 1) for each in spanned.groups())
        return range(first, last + 1, step)
    if not listed:
        raise ValueError(f"{group}: not a group of ranks, as 0-7, 0-56:8 or 0,3,4")
    return [*map(int, group.split(","))]


def largest(transfers: Sequence[Transfer], number: int) -> list[tuple[str, int]]:
    """The names for which most moves, with their bytes; what nobody names is left out."""
    totals: Counter[str] = Counter()
    for each in transfers:
        for cause in each.causes or ():
            totals[cause.name] += cause.bytes
    return [(name, nbytes) for name, nbytes in totals.most_common(number) if name]


def unnamed(transfers: Iterable[Transfer]) -> int:
    """The payload bytes for which nothing was seen that has a name."""
    return sum(
        each.bytes - sum(cause.bytes for cause in each.causes or () if cause.name) for each in transfers
    )
