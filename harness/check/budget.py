"""Compares a test's memory with its budget and its baseline, and words the failures for the pytest plugin."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from harness.check import announce, baseline, traffic_budget
from harness.check.marks import BUDGETED_ON_CARD, Request
from harness.check.tolerance import tolerances
from harness.check.verdict import judge
from harness.record import record_file
from harness.tables import Table, size

if TYPE_CHECKING:
    from harness.ledger import Gap, Ledger
    from harness.rehearsal.card_ledger import CardLedger

UNOWNED = ("activations", "workspace", "communication", "inputs")
"""The categories that have no owner: the ledger assigns them by the operator that makes the tensor."""
HELD = {
    "total": "the test held",
    "saved": "what is saved for backward held",
    "reserved": "PyTorch's allocator reserved",
}
"""How a failure begins, where it is of no category."""
LARGEST = 8
"""How many holdings a failed test shows."""
AGAIN = "if the change is intended, --memory-update makes it the baseline"


def _own_peaks(ledger: "Ledger") -> dict[str, int | None]:
    """The own peak of each figure that can have a budget, in bytes. None: not measured.

    The ledger does not see the storages inside a compiled program, so then the total is the allocator's.
    """
    own = {name: category.peak for name, category in ledger.categories.items()}
    total: int | None = ledger.peak.bytes
    if any(gap.figures == "storages" for gap in ledger.gaps):
        total = ledger.allocator.peak
    if ledger.peak.allocated is not None:
        total, own["reserved"] = ledger.peak.allocated, ledger.peak.reserved
    return {**own, "total": total, "saved": ledger.saved}


def exceeded(ledger: "Ledger", request: Request) -> Iterator[str]:
    """A sentence for each limit of `request` that is exceeded, or that cannot be judged, and where it does not fit."""
    if request.hardware and request.fits:
        yield from _unfit(cast("CardLedger", ledger), request.hardware)
    measured = _own_peaks(ledger) if request.limits else {}
    for name, limit in request.limits.items():
        peak = measured[name]
        if peak is not None and peak > limit:
            held, excess = HELD.get(name, f"{name} held"), size(peak - limit)
            yield f"{held} {size(peak)} at its peak, {excess} over its budget of {size(limit)}"
        elif (gap := _gap(ledger, name)) is not None:
            total_known = gap.figures == "storages" and ledger.allocator.peak is not None
            instead = "; total can, by the allocator" if total_known else ""
            yield f"memory_budget({name}={size(limit)!r}) cannot be judged{instead}: {gap.sentence}"
    yield from traffic_budget.exceeded(ledger, request)


def _unfit(ledger: "CardLedger", hardware: str) -> Iterator[str]:
    """A sentence where the test does not fit into the card of the page `hardware`."""
    memory, first = ledger.memory, ledger.exhausted
    if first is not None:
        step, phase, _ = first.where
        within = f", in {first.module}" if first.module else ""
        yield (
            f"the test does not fit into {hardware}: {first.op.partition('.')[0]} finds no room for "
            f"{size(first.nbytes)} in step {step}, {phase}{within}; PyTorch may reserve {size(memory.capacity)}, "
            f"and the test needs {size(memory.peak_reserved)}"
        )


def _gap(ledger: "Ledger", name: str) -> "Gap | None":
    """The gap in the ledger because of which the peak of `name` is not known; None where it is known."""
    lacks = {"all"} | ({name} & {"saved", "kernel"})
    if name in UNOWNED or (name in ("total", "reserved") and ledger.allocator.peak is None):
        lacks.add("storages")
    return next((gap for gap in ledger.gaps if gap.figures in lacks), None)


def off_baseline(
    ledger: "Ledger", file: Path, name: str, device: str, update: bool, root: Path
) -> Iterator[str]:
    """How the test `name` differs from the baseline in `file`. With `update` it writes the file and yields nothing.

    `device` is whose memory this is: "cpu", "cuda", or the hardware page of a rehearsal.
    """
    path = file.relative_to(root) if file.is_relative_to(root) else file
    try:
        if gap := next(
            (gap for gap in ledger.gaps if gap.figures not in ("allocator", "kernel", "traffic")), None
        ):
            raise ValueError(f"{path}: the test cannot be compared with a baseline: {gap.sentence}")
        measured = _measured(ledger, name, device)
        if update:
            baseline.update(file, measured, {})
        elif not file.exists():
            yield f"{path}: there is no baseline; run with --memory-update to make it"
        else:
            expected = baseline.read(file)
            if expected.device != device:
                raise ValueError(
                    f"{path}: it is a baseline of {expected.device}, and the test has the memory of {device}; "
                    "--memory-update makes it anew"
                )
            allowed = tolerances(expected.tolerance, "")
            verdict = judge(path, expected, measured, {}, allowed)
            if verdict.code:
                yield announce.text([verdict], AGAIN)
    except ValueError as error:
        yield str(error)


def _measured(ledger: "Ledger", name: str, device: str) -> baseline.Baseline:
    """The memory of the test `name`, in the form of a baseline."""
    rank = record_file.rank_record(ledger, 0)
    return baseline.Baseline(
        config=[],
        mode=baseline.TEST,
        device=device,
        world=1,
        model=baseline.Model(name=name, parameters=None, dtype=None),
        made_by=baseline.made_by(record_file.environment().packages),
        ranks=[baseline.Ranks(ranks="0", **dict(baseline.accounting_of(rank)))],
    )


def text_of(ledger: "Ledger", request: Request, root: Path) -> str:
    """The test's memory: each category, its budget, and the largest storages with the lines that allocated them."""
    peak, own_peaks, budgets = ledger.peak, _own_peaks(ledger), request.limits
    device = f"{request.hardware}, rehearsed" if request.hardware else ledger.device
    where = f"step {peak.where.step}, {peak.where.phase}{f', in {peak.module}' if peak.module else ''}"
    table = Table(["at the peak"], ["its own peak"], ["budget"])
    table.section(f"{device}, at most in {where}")
    at_peak: dict[str, int | None] = {**peak.categories, "total": peak.bytes, "saved": peak.saved}
    for name in BUDGETED_ON_CARD:
        if own_peaks.get(name) or name in budgets:
            budget = size(budgets[name]) if name in budgets else ""
            then = size(at_peak[name]) if name in at_peak else ""
            table.row(f"  {name}", then, size(own_peaks[name]), budget)
    largest = [each for each in peak.holdings if each.name != "others"][:LARGEST]
    rows = [
        f"  {size(each.bytes):>10}   {each.category}: {each.name}{f' x {each.storages}' if each.storages > 1 else ''}"
        f"   {_short_line(each.line, root)}".rstrip()
        for each in largest
    ]
    return "\n".join([table.text(), *(["largest then, and the line that made it", *rows] if rows else [])])


def _short_line(line: str, root: Path) -> str:
    """`line` relative to the project's root, or to the directory of the installed packages."""
    _, installed, rest = line.rpartition("site-packages/")
    if installed:
        return rest
    return line.removeprefix(f"{root}/")
