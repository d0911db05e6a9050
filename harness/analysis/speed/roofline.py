"""`harness roofline RUN [RUN ...]`: what bounds each phase of a run, and where that changes. It imports no torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from harness.analysis.args import Parser, refuse
from harness.analysis.moves.links import pages
from harness.analysis.moves.links_model import machine as links_of
from harness.analysis.speed import communication
from harness.analysis.speed.estimate import Estimate, Interval, of_step
from harness.analysis.speed.roofline_model import Bound, Turn, bounds
from harness.record.ceilings import of_page
from harness.record.fields import printable
from harness.record.record_file import read
from harness.record.results import Ceilings
from harness.record.schema import Record, parse
from harness.tables import Table, count, seconds, size

WIDTH = 120

NOTES = (
    "FLOPs are those of matrix products and attention. Bytes are those of the tensors that operators take and make, as "
    "if nothing stayed in the device's caches in between: what fits into caches can be faster than `at best`. What "
    "ranks send each other is in neither.",
    "The estimate goes by the efficiencies that others published of such operators on such GPUs, run one by one as "
    "written; the seconds in brackets are limits that held on each of their runs by the fit of the others "
    "(profiles/speed). It has nothing but operators: no loading of data, no checkpoint. Of several ranks, a step "
    "also has what they send each other: at best all that an engine may do meanwhile is hidden behind the phase's "
    "operators, at worst nothing; the seconds are halfway.",
    "MFU: the FLOPs, over seconds, over the dense peak. MBU, of a decode, as gpt-fast has it: weights and KV cache "
    "once for each token of a batch, over seconds, over the bandwidth.",
    "Seconds are of steps that no exact ledger slowed, the slowest rank's.",
)


class Against(NamedTuple):
    """A run, the ceilings that it is compared with, and how long its ranks send in a step. None: there is one rank."""

    name: str
    record: Record
    ceilings: Ceilings
    phases: list[Bound]
    communication: Estimate | None = None


def main(argv: Sequence[str]) -> int:
    """Run `harness roofline RUN [RUN ...]`; returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        runs = [
            against(path, parse(read(path), str(path)), options.hardware, options.network)
            for path in options.run
        ]
    except ValueError as error:
        return refuse(error)
    print(json.dumps([as_json(run) for run in runs], indent=1) if options.json else "\n\n".join(text(runs)))
    return 0


def _parser() -> Parser:
    parser = Parser(
        "roofline",
        description="Compare each phase of a run with what its machine can do: whether compute or memory bounds "
        "it, by how much, and at which batch and context that would change.",
        epilog="Exit code 2: a run has no record that can be read.",
    )
    parser.takes_runs("+")
    parser.add_argument(
        "--hardware", metavar="NAME", help="compare it with this page of conf/hardware instead"
    )
    parser.add_argument("--network", metavar="NAME", help="a page of conf/network; else the run's own")
    parser.add_argument(
        "--json", action="store_true", help="the same as JSON; null: not measured, or not known"
    )
    return parser


def against(path: Path, record: Record, hardware: str | None = None, network: str | None = None) -> Against:
    """Compare `record` with its own machine, or with the pages of these names. Raises ValueError for an unknown name.

    With `hardware`, measured seconds count only if the run used the same kind of device.
    """
    card, joined = pages(record, hardware, network)
    ceilings, timed = record.limits, True
    if hardware is not None and card is not None:
        ceilings = of_page(card, record.model.multiplied) or Ceilings()
        timed = card.device == record.world.device
    phases = bounds(record, ceilings, timed)
    if not phases or record.world.size == 1:
        return Against(printable(str(path)), record, ceilings, phases)
    sent = communication.of_step(record, phases[:-1], links_of(card, joined, {}).rates, ceilings.source)
    whole = of_step([each.estimate for each in phases[:-1]], record.world.size, sent)
    phases[-1] = replace(phases[-1], estimate=whole)
    return Against(printable(str(path)), record, ceilings, phases, sent)


def as_json(run: Against) -> dict[str, object]:
    """The run, its ceilings and its phases as plain data."""
    sent = None if run.communication is None else run.communication.interval
    return {
        "run": run.name,
        "ceilings": run.ceilings.model_dump() if run.ceilings.source else None,
        "phases": [{**each.as_dict(), "sentence": sentence(each)} for each in run.phases],
        "communication": None if sent is None else sent._asdict(),
    }


def text(runs: Sequence[Against]) -> Iterator[str]:
    """A table and sentences for each run; at the end, once, the notes about the figures."""
    for run in runs:
        yield "\n".join(_lines(run))
    if any(run.phases for run in runs):
        yield "\n".join(fill(note, WIDTH) for note in NOTES)


def _lines(run: Against) -> Iterator[str]:
    record = run.record
    yield f"{run.name}: {record.heading}"
    if not run.phases:
        yield "its record has no FLOPs and bytes moved; a run with ledger=exact of this version counts them"
        return
    yield machine(run.ceilings)
    names = ("FLOP", "moved", "FLOP/B", "at best", "estimate", "seconds", "MFU", "MBU", "bound by")
    table = Table(*([name] for name in names))
    for each in run.phases:
        if each is run.phases[-1]:
            table.rule()
        table.row(*_cells(each))
    yield table.text()
    yield from (fill(line, WIDTH) for each in run.phases[:-1] if (line := sentence(each)))
    if run.communication is not None and (sent := run.communication.interval) is not None:
        yield fill(
            f"In the estimate of {run.phases[-1].phase}, {_estimate_text(sent)} are what ranks send each other.",
            WIDTH,
        )
    yield from (fill(line, WIDTH) for line in _refusals(run))


def machine(ceilings: Ceilings) -> str:
    """The machine's peak rates, in a line."""
    if ceilings.balance is None:
        if ceilings.bandwidth is None:
            return "the record names no machine to compare it with; --hardware NAME gives one"
        return (
            f"{ceilings.source}: no rate of {ceilings.dtype} is known, and {count(ceilings.bandwidth, 'B/s')}"
        )
    return (
        f"{ceilings.source}: {count(ceilings.flops, 'FLOP/s')} of {ceilings.dtype}, "
        f"{count(ceilings.bandwidth, 'B/s')}; they balance at {ceilings.balance:,.0f} FLOP/B"
    )


def _cells(bound: Bound) -> Iterator[str]:
    yield f"  {bound.phase}"
    yield count(bound.flops)
    yield size(bound.moved)
    yield "-" if bound.intensity is None else f"{bound.intensity:,.2f}"
    yield seconds(bound.at_best)
    yield _estimate_text(bound.estimate.interval)
    yield seconds(bound.seconds)
    yield from ("-" if share is None else f"{share:.1%}" for share in (bound.mfu, bound.mbu))
    yield _bound_text(bound)


def _estimate_text(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{seconds(interval.seconds)} ({seconds(interval.low)} to {seconds(interval.high)})"


def _refusals(run: Against) -> Iterator[str]:
    """Why phases have no estimate, each reason once."""
    names: dict[str, list[str]] = {}
    for each in run.phases:
        if each.estimate.why:
            names.setdefault(each.estimate.why, []).append(each.phase)
    yield from (f"no estimate of {' and '.join(phases)}: {why}." for why, phases in names.items())


def _bound_text(bound: Bound) -> str:
    if bound.by is None or bound.times is None:
        return "-"
    times = bound.times if bound.by == "compute" else bound.times and 1 / bound.times
    return f"{bound.by}, x {times:,.1f}" if times else bound.by


def sentence(bound: Bound) -> str:
    """What bounds a phase, by how much, and where the bound would change; empty where it is not known."""
    if bound.by is None or bound.times is None:
        return ""
    if not bound.times:
        return f"{bound.phase} is memory-bound: it has no matrix product."
    long, short = ("computing", "moving") if bound.by == "compute" else ("moving", "computing")
    times = max(bound.times, 1 / bound.times)
    clause = f"{bound.phase} is {bound.by}-bound: {long} takes {times:,.1f} times as long as {short}"
    crossover = bound.turn
    if crossover is None:
        return f"{clause}."
    return f"{clause}; {_batch(bound, crossover)}{_context(bound, crossover)}."


def _batch(bound: Bound, crossover: Turn) -> str:
    if bound.by == "memory":
        if crossover.batch is None:
            return (
                "no batch would change that, because each sequence moves its own KV cache, which gives "
                f"{crossover.own:,.1f} FLOP/B, and the machine balances at {bound.ceilings.balance:,.0f}"
            )
        return f"it would be compute-bound from a batch of {crossover.batch:,.0f} on"
    if crossover.batch is None or crossover.batch < 1:
        return "so it would be at any batch"
    return f"it would be memory-bound below a batch of {crossover.batch:,.1f}"


def _context(bound: Bound, crossover: Turn) -> str:
    """How the context length changes the bound; empty where it does not."""
    if bound.by == "compute":
        return "" if crossover.context is None else f", or beyond a context of {crossover.context:,.0f}"
    if bound.phase != "decode":
        return ""
    if crossover.batch is not None and crossover.longest is not None:
        return f" at this context; beyond one of {crossover.longest:,.0f} no batch would change it"
    return f"; below a context of {crossover.longest:,.0f} one would" if crossover.longest else ""


def line(record: Record) -> str:
    """One line about what bounds the run, printed at its end; empty where it is not known."""
    phases = bounds(record)
    if not phases or phases[-1].at_best is None:
        return ""
    whole = phases[-1]
    bounding = ", ".join(f"{each.phase} by {_bound_text(each)}" for each in phases[:-1])
    elapsed = "" if whole.seconds is None else f", and took {seconds(whole.seconds)}"
    return (
        f"bound: {bounding}; {whole.phase} takes {seconds(whole.at_best)} at best{elapsed} (harness roofline)"
    )
