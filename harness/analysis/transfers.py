"""What a run moves in a step or a batch, by link and phase, read from its record. It imports no torch."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from harness.analysis.roofline_model import PHASES
from harness.record.memory import Phase, Rank, Transfer
from harness.record.schema import Record

UNKNOWN = "unknown"
"""The link of a transfer whose link is not known: the record does not say where its ranks are."""


def of_step(record: Record, rank: Rank) -> list[Transfer] | None:
    """What `rank` moves in the last training step, or the last batch of inference, that its ledger saw exactly.

    Set-up, validation and checkpoints are no part of it. If no step was seen exactly, each phase is taken as it was
    recorded last: a ledger that sums owners records a phase again only where something else moved. None: traffic was
    not counted.
    """
    if rank.traffic is None:
        return None
    names = ("data", *PHASES.get(record.mode, ()))
    rows = [each for each in rank.traffic if each.phase in names]
    exact = [each.step for each in rank.phases if each.phase in names and each.peak is not None]
    if exact:
        return [each for each in rows if each.step == max(exact)]
    last = {(each.phase, each.micro_batch): each.step for each in rows}
    return [each for each in rows if last[each.phase, each.micro_batch] == each.step]


def phases_of_step(record: Record, rank: Rank) -> list[Phase]:
    """The phases of `rank` in the step of `of_step`, in their order, also those in which nothing moves."""
    names = ("data", *PHASES.get(record.mode, ()))
    phases = [each for each in rank.phases if each.phase in names]
    exact = [each.step for each in phases if each.peak is not None]
    if exact:
        return [each for each in phases if each.step == max(exact)]
    last = {(each.phase, each.micro_batch): each for each in phases}
    return list(last.values())


def beside(record: Record, rank: Rank) -> list[Transfer] | None:
    """What `rank` moves outside of steps and batches: in set-up, validation and checkpoints. None: not counted."""
    names = ("data", *PHASES.get(record.mode, ()))
    return None if rank.traffic is None else [each for each in rank.traffic if each.phase not in names]


def by_link(transfers: Iterable[Transfer]) -> dict[str, int]:
    """Payload bytes by link."""
    totals: Counter[str] = Counter()
    for each in transfers:
        totals[each.link or UNKNOWN] += each.bytes
    return dict(totals)


def worst(record: Record) -> Rank | None:
    """The rank that moves most in a step. None: no rank has its traffic counted."""
    counted: list[tuple[int, Rank]] = []
    for rank in record.ranks:
        rows = of_step(record, rank)
        if rows is not None:
            counted.append((sum(each.bytes for each in rows), rank))
    return max(counted, key=lambda pair: (pair[0], -pair[1].rank), default=(0, None))[1]


def passes(record: Record, rank: Rank) -> int | None:
    """The forward passes of a decode of the last batch that was seen exactly: each gives a token of every sequence.

    None: there was none, or nothing counted them.
    """
    decodes = [each for each in rank.phases if each.phase == "decode" and each.passes]
    if record.mode != "infer" or not decodes:
        return None
    last = max(each.step for each in decodes)
    return max(each.passes or 0 for each in decodes if each.step == last)


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


def members(group: str) -> Iterator[int]:
    """The ranks of a transfer's `group`: `0-7`, `0-56:8` or `0,3,4`. Raises ValueError for another text."""
    if not group:
        return
    if "-" in group:
        span, _, step = group.partition(":")
        first, last = map(int, span.split("-"))
        yield from range(first, last + 1, int(step or 1))
    else:
        yield from map(int, group.split(","))


def largest(transfers: Sequence[Transfer], number: int) -> list[tuple[str, int]]:
    """The names for which most moves, with their bytes; what nobody names is left out."""
    totals: Counter[str] = Counter()
    for each in transfers:
        for cause in each.causes or ():
            totals[cause.name] += cause.bytes
    return [(name, nbytes) for name, nbytes in totals.most_common(number) if name]
