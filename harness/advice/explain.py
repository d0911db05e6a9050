"""`harness explain RUN`: the parts of a run's peak, unexpected findings, and the change that would save most."""

import json
import sys
from collections.abc import Iterator, Sequence
from textwrap import fill

from harness.analysis.args import Parser, refuse
from harness.analysis.findings.adapter import ADAPTED
from harness.analysis.findings.finding import Finding, Run
from harness.analysis.findings.fp8 import IN_8_BITS
from harness.analysis.findings.kv_cache import CACHED
from harness.analysis.findings.memory import FINDINGS
from harness.analysis.findings.pipeline import STAGES, kept_by
from harness.analysis.findings.traffic import MOVED
from harness.record.fields import printable
from harness.record.memory import Rank
from harness.record.record_file import read
from harness.record.schema import Failure, Record, parse
from harness.tables import size

WIDTH = 100
LARGEST = 3
"""How many categories, and how many holdings, are named."""

WHY = {
    "gradients": "its share of the parameters has parts of larger ones, whose gradients it keeps in full",
    "kv_cache": "its prompts are longer or more",
    "inputs": "its prompts are longer or more",
}
"""Why one rank has more of a category than another. The first category that fits gives the reason."""


def main(argv: Sequence[str]) -> int:
    """Run `harness explain RUN`. Exit code: 0 done, 2 a wrong request, 3 the run's own rehearsal failed, so that the
    record alone is explained.
    """
    try:
        options = _parser().parse_args(argv)
        record = parse(read(options.run), str(options.run))
    except ValueError as error:
        return refuse(error)
    findings, failed = list(explain(record)), ""
    if options.rehearsal:
        from harness.advice.savings import Failed, savings  # its processes import torch

        try:
            findings += savings(record)
        except Failed as error:
            failed = str(error)
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        print(text(record, findings))
    if failed:
        print(f"harness: {printable(failed)}", file=sys.stderr)
    return 3 if failed else 0


def _parser() -> Parser:
    parser = Parser(
        "explain",
        description="Say what uses a run's memory, what is unexpected in it, and which change would save most.",
        epilog="The change is rehearsed with the run's own config. Exit code 2: there is no record that can be read. "
        "3: that rehearsal failed.",
    )
    parser.takes_runs()
    parser.add_argument(
        "--no-rehearsal", dest="rehearsal", action="store_false", help="the record alone, in a second"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON: kind, sentence, bytes")
    return parser


def explain(record: Record) -> Iterator[Finding]:
    """The findings from the record alone, the most important first."""
    run = Run(record)
    for finder in (
        failure,
        unattributed,
        made_of,
        reserved,
        holdings,
        packed,
        ranks,
        *STAGES,
        *ADAPTED,
        *IN_8_BITS,
        *CACHED,
        *FINDINGS,
        *MOVED,
        not_in_them,
    ):
        yield from finder(run)


def text(record: Record, findings: Sequence[Finding]) -> str:
    """The findings for a terminal, below a heading."""
    lines = [record.heading]
    for finding in findings:
        sentence = printable(finding.sentence)
        lines.append(
            f"  {sentence}" if finding.kind == "command" else fill(sentence, WIDTH, subsequent_indent="  ")
        )
    return "\n".join(lines)


def failure(run: Run) -> Iterator[Finding]:
    """Where a failed run failed, with which error, and how many of its ranks left a record."""
    record = run.record
    if record.status != "failed":
        return
    failure_record = record.failure or Failure()
    rank = "It failed" if failure_record.rank is None else f"Rank {failure_record.rank} failed"
    where = (
        ""
        if failure_record.where is None
        else f" in step {failure_record.where.step}, {failure_record.where.phase}"
    )
    yield Finding("failure", f"{rank}{where}: {failure_record.error or 'its record does not say why'}", None)
    if failure_record.shortage is not None:
        then = sorted(((b or 0, n) for n, b in failure_record.shortage.categories.items()), reverse=True)
        parts = [f"{size(nbytes)} {name}" for nbytes, name in then[:LARGEST] if nbytes]
        if parts:
            total = sum(nbytes for nbytes, _ in then)
            yield Finding("failure", f"Allocated then: {size(total)}, of it {', '.join(parts)}.", total)
    rank_count = len(record.peaks)
    if rank_count < run.size:
        coverage = (
            "no rank has saved its accounting"
            if not rank_count
            else f"{rank_count} of {run.size} ranks saved their accounting"
        )
        yield Finding("failure", f"Nothing is known beyond that: {coverage}.", None)


def unattributed(run: Run) -> Iterator[Finding]:
    """Bytes that the allocator counted and the ledger cannot name."""
    missing = {rank.rank: _unattributed_bytes(rank) for rank in run.record.ranks}
    worst = max(missing, key=lambda number: missing[number], default=0)
    if missing.get(worst, 0) > 0:
        figure = missing[worst]
        sentence = (
            f"CAUTION: on rank {worst} the allocator counted {size(figure)} that the ledger cannot name. "
            "No category below has them."
        )
        yield Finding("unattributed", sentence, figure)


def _unattributed_bytes(rank: Rank) -> int:
    allocator = rank.allocator
    if allocator.unattributed is None and allocator.peak is not None and rank.peak.bytes is not None:
        return allocator.peak - rank.peak.bytes  # this allocator reports only its peak
    return allocator.unattributed or 0


def made_of(run: Run) -> Iterator[Finding]:
    """The worst rank's peak by category, and its place in the run."""
    peak = run.peak
    if peak.bytes is None:
        if run.record.ranks:
            yield Finding("peak", "No peak was measured; ledger=exact measures it.", None)
        return
    largest = sorted(((figure or 0, name) for name, figure in peak.categories.items()), reverse=True)
    shown = [pair for pair in largest[:LARGEST] if pair[0]]
    rest = peak.bytes - sum(figure for figure, _ in shown)
    parts = [f"{size(figure)} {name}{_share(figure, peak.bytes)}" for figure, name in shown]
    parts += [f"{size(rest)} others"] if rest else []
    where = ""
    if peak.where is not None:
        module = f"in {peak.where.module}" if peak.where.module else "outside any module"
        micro_batch = f" of micro-batch {peak.where.micro_batch}" if peak.where.micro_batch else ""
        where = f" That is in step {peak.where.step}, {peak.where.phase}{micro_batch}, {module}."
    yield Finding(
        "peak", f"{_subject(run)} {size(peak.bytes)} at its peak: {', '.join(parts)}.{where}", peak.bytes
    )


def _share(figure: int, total: int) -> str:
    return f" ({figure / total:.0%})" if total else ""


def reserved(run: Run) -> Iterator[Finding]:
    """What a GPU's allocator reserves beyond what is allocated, and whether that is why the run does not fit."""
    fullest = max(run.record.ranks, key=lambda rank: rank.allocator.reserved or 0, default=run.worst)
    allocator, peak = fullest.allocator, fullest.peak
    if allocator.reserved is None or allocator.slack is None:
        return
    of_rank = f" on rank {fullest.rank}" if run.size > 1 else ""
    split = f", {size(allocator.split)} of it in segments that are partly in use" if allocator.split else ""
    sentence = (
        f"The allocator reserves {size(allocator.reserved)}{of_rank}; {size(allocator.slack)} of that was not "
        f"allocated then{split}. At most {size(peak.allocated)} is allocated."
    )
    yield Finding("reserved", sentence, allocator.slack)
    if allocator.exhausted is not None:
        place = f"step {allocator.exhausted.step}, {allocator.exhausted.phase}"
        sentence = f"It does not fit: the GPU has no room for {size(allocator.exhausted.bytes)} in {place}."
        yield Finding("exhausted", sentence, allocator.exhausted.bytes)


def _subject(run: Run) -> str:
    """The subject of the sentence about the peak, with its verb."""
    peaks = run.record.peaks
    covered = {number for rank in run.record.ranks for number in (*rank.numbers, *rank.bounds)}
    if run.size == 1:
        return "It holds"
    if len(peaks) == run.size and len(set(peaks.values())) == 1:
        return f"Each of the {run.size} ranks holds"
    return f"Rank {run.worst.rank} of {run.size}{', the highest,' if len(covered) == run.size else ''} holds"


def holdings(run: Run) -> Iterator[Finding]:
    """The largest holdings by name, summed over the layers."""
    together: dict[tuple[str, str], int] = {}
    for holding in run.holdings:
        name = holding.pattern, holding.category
        if holding.name != "others":
            together[name] = together.get(name, 0) + holding.bytes
    folded = {holding.category for holding in run.holdings if holding.name == "others"}
    largest = sorted(together.items(), key=lambda pair: (-pair[1], pair[0]))[:LARGEST]
    parts = [
        f"{name} {'at least ' if category in folded and '*' in name else ''}{size(total)}"
        for (name, category), total in largest
    ]
    if parts:
        yield Finding("holdings", f"Largest by name: {'; '.join(parts)}.", sum(total for _, total in largest))


def packed(run: Run) -> Iterator[Finding]:
    """Weights are packed in the checkpoint but whole in memory."""
    quantization = run.record.model.quantization
    if quantization is not None and quantization.whole is not None:
        sentence = (
            f"The checkpoint's weights are packed ({quantization.short}), and transformers unpacks them "
            f"{quantization.whole}: a parameter takes as much as in {run.record.model.dtype}."
        )
        yield Finding("packed", sentence, None)


def ranks(run: Run) -> Iterator[Finding]:
    """How far the worst rank is above the lowest rank, and which category it has more of."""
    measured = [rank for rank in run.record.ranks if rank.peak.bytes is not None]
    why_worst = run.worst.why
    if len({rank.peak.bytes for rank in measured}) < 2:
        if why_worst and len(measured) == 1:
            yield Finding("worst_rank", f"Rank {run.worst.rank} is the worst: {why_worst}.", None)
        return
    lowest = min(measured, key=lambda rank: (rank.peak.bytes or 0, rank.rank))
    distance = run.whole - (lowest.peak.bytes or 0)
    more = _differences(run.worst, lowest)
    largest = max(more, key=lambda name: more[name], default="")
    has = f", with {size(more[largest])} more {largest}" if more.get(largest, 0) > 0 else ""
    reason = why_worst or next((reason for name, reason in WHY.items() if more.get(name, 0) > 0), "")
    if run.worst.stage != lowest.stage:
        worst_keeps, lowest_keeps = (
            f"stage {rank.stage} keeps {kept_by(rank)}" for rank in (run.worst, lowest)
        )
        reason = (
            f"{worst_keeps} for their backward, {lowest_keeps}"
            if run.record.mode == "train"
            else "they are of two stages"
        )
    why = f": {reason}" if reason else ""
    sentence = f"Rank {run.worst.rank} is {size(distance)} above rank {lowest.rank}{has}{why}."
    yield Finding("worst_rank", sentence, distance)


def _differences(one: Rank, other: Rank) -> dict[str, int]:
    """By category, the bytes that `one` has at its peak beyond those of `other` at its own peak."""
    return {
        name: (figure or 0) - (other.peak.categories.get(name) or 0)
        for name, figure in one.peak.categories.items()
    }


def not_in_them(run: Run) -> Iterator[Finding]:
    """Memory that none of the figures contains."""
    world = run.record.world
    gpu = world.device != "cpu"
    around = ["the CUDA context, NCCL's buffers"] if gpu else []
    if gpu and run.worst.allocator.reserved is None:
        around.append("the allocator's slack")
    if world.rehearsed:
        parts = [*(["scratch inside kernels"] if run.peak.categories.get("kernel") is None else []), *around]
        verified = f" ({world.verified})" if world.verified else ""
        missing = f": not in them are {_joined(parts)}" if parts else ""
        yield Finding("rehearsed", f"Rehearsed figures{verified}{missing}.", None)
    elif gpu:
        yield Finding(
            "outside_torch", f"nvidia-smi shows more: not in these figures are {_joined(around)}.", None
        )


def _joined(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
