"""`harness explain RUN`: what a run's peak is made of, what surprises in it, and the change that would save most."""

import json
import sys
from collections.abc import Iterator, Sequence
from textwrap import fill

from harness.analysis.args import Parser
from harness.analysis.findings import SURPRISES, Finding, Run
from harness.analysis.findings_kv_cache import CACHED
from harness.analysis.findings_pipeline import STAGES, kept_by
from harness.record.record_file import read
from harness.record.schema import Failure, Rank, Record, parse, printable
from harness.tables import size

WIDTH = 100
LARGEST = 3
"""How many categories, and how many holdings, are named."""

WHY = {
    "gradients": "its share of the parameters touches larger ones, whose gradients it holds whole",
    "kv_cache": "its prompts are longer or more",
    "inputs": "its prompts are longer or more",
}
"""What it means that one rank has more of a category than another; the first that fits is the reason."""


def main(argv: Sequence[str]) -> int:
    """`harness explain RUN`; the exit code."""
    try:
        asked = _parser().parse_args(argv)
        record = parse(read(asked.run), str(asked.run))
    except ValueError as error:
        print(f"harness: {printable(str(error))}", file=sys.stderr)
        return 2
    findings = list(explain(record))
    if asked.rehearsal:
        from harness.advice.savings import savings  # its processes import torch

        findings += savings(record)
    if asked.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        print(text(record, findings))
    return 0


def _parser() -> Parser:
    parser = Parser(
        "explain",
        description="Say what holds a run's memory, what surprises in it, and which change would save most.",
        epilog="The change is rehearsed with the run's own config. Exit code 2: there is no record that can be read.",
    )
    parser.takes_runs()
    parser.add_argument(
        "--no-rehearsal", dest="rehearsal", action="store_false", help="the record alone, in a second"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON: kind, sentence, bytes")
    return parser


def explain(record: Record) -> Iterator[Finding]:
    """What the record alone shows, the most important first."""
    run = Run(record)
    for found in (
        failure,
        unattributed,
        made_of,
        holdings,
        packed,
        ranks,
        *STAGES,
        *CACHED,
        *SURPRISES,
        not_in_them,
    ):
        yield from found(run)


def text(record: Record, findings: Sequence[Finding]) -> str:
    """The findings for a terminal, under what ran."""
    lines = [record.heading]
    for finding in findings:
        sentence = printable(finding.sentence)
        lines.append(
            f"  {sentence}" if finding.kind == "command" else fill(sentence, WIDTH, subsequent_indent="  ")
        )
    return "\n".join(lines)


def failure(run: Run) -> Iterator[Finding]:
    """A run that failed: where, with what, and how much of it is known."""
    record = run.record
    if record.status != "failed":
        return
    told = record.failure or Failure()
    rank = "It failed" if told.rank is None else f"Rank {told.rank} failed"
    where = "" if told.where is None else f" in step {told.where.step}, {told.where.phase}"
    yield Finding("failure", f"{rank}{where}: {told.error or 'its record does not say why'}", None)
    known = len(record.peaks)
    if known < run.size:
        books = "no rank has left its books" if not known else f"{known} of {run.size} ranks left its books"
        yield Finding("failure", f"Nothing is known beyond that: {books}.", None)


def unattributed(run: Run) -> Iterator[Finding]:
    """Bytes that the allocator counted and the ledger cannot name."""
    missing = {rank.rank: _missing(rank) for rank in run.record.ranks}
    worst = max(missing, key=lambda number: missing[number], default=0)
    if missing.get(worst, 0) > 0:
        figure = missing[worst]
        sentence = (
            f"CAUTION: on rank {worst} the allocator counted {size(figure)} that the ledger cannot name. "
            "No category below has them."
        )
        yield Finding("unattributed", sentence, figure)


def _missing(rank: Rank) -> int:
    books = rank.allocator
    if books.unattributed is None and books.peak is not None and rank.peak.bytes is not None:
        return books.peak - rank.peak.bytes  # an allocator that tells its peak, and not what it is made of
    return books.unattributed or 0


def made_of(run: Run) -> Iterator[Finding]:
    """The worst rank's peak, by category, and when it is."""
    peak = run.peak
    if peak.bytes is None:
        if run.record.ranks:
            yield Finding("peak", "No peak was measured; ledger=exact measures it.", None)
        return
    largest = sorted(((held or 0, name) for name, held in peak.categories.items()), reverse=True)
    named = [pair for pair in largest[:LARGEST] if pair[0]]
    rest = peak.bytes - sum(held for held, _ in named)
    parts = [f"{size(held)} {name} ({held / peak.bytes:.0%})" for held, name in named]
    parts += [f"{size(rest)} others"] if rest else []
    where = ""
    if peak.where is not None:
        module = f"in {peak.where.module}" if peak.where.module else "outside any module"
        micro_batch = f" of micro-batch {peak.where.micro_batch}" if peak.where.micro_batch else ""
        where = f" That is in step {peak.where.step}, {peak.where.phase}{micro_batch}, {module}."
    yield Finding(
        "peak", f"{_who(run)} {size(peak.bytes)} at its peak: {', '.join(parts)}.{where}", peak.bytes
    )


def _who(run: Run) -> str:
    """Whose peak it is, with a verb."""
    peaks = run.record.peaks
    known = {number for rank in run.record.ranks for number in (*rank.numbers, *rank.bounds)}
    if run.size == 1:
        return "It holds"
    if len(peaks) == run.size and len(set(peaks.values())) == 1:
        return f"Each of the {run.size} ranks holds"
    return f"Rank {run.worst.rank} of {run.size}{', the highest,' if len(known) == run.size else ''} holds"


def holdings(run: Run) -> Iterator[Finding]:
    """The largest holdings by name, those of all layers as one."""
    together: dict[tuple[str, str], int] = {}
    for holding in run.holdings:
        name = holding.pattern, holding.category
        if holding.name != "others":
            together[name] = together.get(name, 0) + holding.bytes
    folded = {holding.category for holding in run.holdings if holding.name == "others"}
    largest = sorted(together.items(), key=lambda pair: (-pair[1], pair[0]))[:LARGEST]
    parts = [
        f"{name} {'at least ' if category in folded and '*' in name else ''}{size(held)}"
        for (name, category), held in largest
    ]
    if parts:
        yield Finding("holdings", f"Largest by name: {'; '.join(parts)}.", sum(held for _, held in largest))


def packed(run: Run) -> Iterator[Finding]:
    """Weights that are packed in the checkpoint, and not in memory."""
    told = run.record.model.quantization
    if told is not None and told.whole is not None:
        sentence = (
            f"The checkpoint's weights are packed ({told.short}), and transformers makes them whole {told.whole}: "
            f"a parameter takes as much as in {run.record.model.dtype}."
        )
        yield Finding("packed", sentence, None)


def ranks(run: Run) -> Iterator[Finding]:
    """How much higher the worst rank is than the lowest, and of what it has more."""
    measured = [rank for rank in run.record.ranks if rank.peak.bytes is not None]
    told = run.worst.why
    if len({rank.peak.bytes for rank in measured}) < 2:
        if told and len(measured) == 1:
            yield Finding("worst_rank", f"Rank {run.worst.rank} is the worst: {told}.", None)
        return
    lowest = min(measured, key=lambda rank: (rank.peak.bytes or 0, rank.rank))
    apart = run.whole - (lowest.peak.bytes or 0)
    more = _more(run.worst, lowest)
    most = max(more, key=lambda name: more[name], default="")
    has = f", with {size(more[most])} more {most}" if more.get(most, 0) > 0 else ""
    reason = told or next((reason for name, reason in WHY.items() if more.get(name, 0) > 0), "")
    if run.worst.stage != lowest.stage:
        ours, theirs = (f"stage {rank.stage} keeps {kept_by(rank)}" for rank in (run.worst, lowest))
        reason = (
            f"{ours} for their backward, {theirs}" if run.record.mode == "train" else "they are of two stages"
        )
    why = f": {reason}" if reason else ""
    sentence = f"Rank {run.worst.rank} is {size(apart)} above rank {lowest.rank}{has}{why}."
    yield Finding("worst_rank", sentence, apart)


def _more(one: Rank, other: Rank) -> dict[str, int]:
    """By category, how much more `one` has at its peak than `other` at its own."""
    return {
        name: (held or 0) - (other.peak.categories.get(name) or 0)
        for name, held in one.peak.categories.items()
    }


def not_in_them(run: Run) -> Iterator[Finding]:
    """What is in none of the figures."""
    world = run.record.world
    gpu = world.device != "cpu"
    around = ["the CUDA context, NCCL's buffers", "the allocator's slack"] if gpu else []
    if world.rehearsed:
        parts = ["scratch inside kernels", *around]
        verified = f" ({world.verified})" if world.verified else ""
        yield Finding("rehearsed", f"Rehearsed figures{verified}: not in them are {_and(parts)}.", None)
    elif gpu:
        yield Finding(
            "outside_torch", f"nvidia-smi shows more: not in these figures are {_and(around)}.", None
        )


def _and(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
