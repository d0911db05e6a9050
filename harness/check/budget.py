"""Compares a test's memory with its budget and its baseline, and words the failures for the pytest plugin."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.check import announce, baseline
from harness.check.tolerance import tolerances
from harness.check.verdict import judge
from harness.ledger.categories import CATEGORIES
from harness.record import record_file
from harness.tables import Table, parse_size, size

if TYPE_CHECKING:
    from harness.ledger import Gap, Ledger

BUDGETED = (*CATEGORIES, "total", "saved")
"""What can have a budget: each category's own peak, their common peak, and the most activations saved for backward."""
UNOWNED = ("activations", "workspace", "communication", "inputs")
"""The categories that have no owner: the ledger assigns them by the operator that makes the tensor."""
LARGEST = 8
"""How many holdings a failed test shows."""
AGAIN = "if the change is intended, --memory-update makes it the baseline"


class Mark(Protocol):
    """A pytest mark."""

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """The keyword arguments."""


def limits(marks: Iterable[Mark]) -> dict[str, int]:
    """The limits in bytes by name. The first mark is the closest to the test, and wins. Raises ValueError."""
    by_name: dict[str, int] = {}
    for mark in marks:
        if mark.args or not mark.kwargs:
            raise ValueError("memory_budget: give each limit a name, as memory_budget(activations='10 MiB')")
        for name, amount in mark.kwargs.items():
            if name not in BUDGETED:
                raise ValueError(
                    f"memory_budget({name}={amount!r}): no such category; one of {', '.join(BUDGETED)}"
                )
            try:
                if isinstance(amount, bool) or not isinstance(amount, (int, str)):
                    raise ValueError("not a size; give bytes, or a text as '10 MiB'")
                by_name.setdefault(name, parse_size(str(amount)))
            except ValueError as error:
                raise ValueError(f"memory_budget({name}={amount!r}): {error}") from None
    return by_name


def _own_peaks(ledger: "Ledger") -> dict[str, int | None]:
    """The own peak of each figure that can have a budget, in bytes. None: not measured.

    The ledger does not see the storages inside a compiled program, so then the total is the allocator's.
    """
    own = {name: category.peak for name, category in ledger.categories.items()}
    total: int | None = ledger.peak.bytes
    if any(gap.figures == "storages" for gap in ledger.gaps):
        total = ledger.allocator.peak
    return {**own, "total": total, "saved": ledger.saved}


def exceeded(ledger: "Ledger", limits: Mapping[str, int]) -> Iterator[str]:
    """A sentence for each limit that is exceeded, or that cannot be judged."""
    measured = _own_peaks(ledger) if limits else {}
    for name, limit in limits.items():
        subject = {"total": "the test", "saved": "what is saved for backward"}.get(name, name)
        peak = measured[name]
        if peak is not None and peak > limit:
            excess = size(peak - limit)
            yield f"{subject} held {size(peak)} at its peak, {excess} over its budget of {size(limit)}"
        elif (gap := _gap(ledger, name)) is not None:
            total_known = gap.figures == "storages" and ledger.allocator.peak is not None
            instead = "; total can, by the allocator" if total_known else ""
            yield f"memory_budget({name}={size(limit)!r}) cannot be judged{instead}: {gap.sentence}"


def _gap(ledger: "Ledger", name: str) -> "Gap | None":
    """The gap in the ledger because of which the peak of `name` is not known; None where it is known."""
    lacks = {"all"} | ({name} & {"saved"})
    if name in UNOWNED or (name == "total" and ledger.allocator.peak is None):
        lacks.add("storages")
    return next((gap for gap in ledger.gaps if gap.figures in lacks), None)


def off_baseline(ledger: "Ledger", file: Path, name: str, update: bool, root: Path) -> Iterator[str]:
    """How the test `name` differs from the baseline in `file`. With `update` it writes the file and yields nothing."""
    path = file.relative_to(root) if file.is_relative_to(root) else file
    try:
        if gap := next((gap for gap in ledger.gaps if gap.figures != "allocator"), None):
            raise ValueError(f"{path}: the test cannot be compared with a baseline: {gap.sentence}")
        measured = _measured(ledger, name)
        if update:
            baseline.update(file, measured, {})
        elif not file.exists():
            yield f"{path}: there is no baseline; run with --memory-update to make it"
        else:
            expected = baseline.read(file)
            allowed = tolerances(expected.tolerance, "")
            verdict = judge(path, expected, measured, {}, allowed)
            if verdict.code:
                yield announce.text([verdict], AGAIN)
    except ValueError as error:
        yield str(error)


def _measured(ledger: "Ledger", name: str) -> baseline.Baseline:
    """The memory of the test `name`, in the form of a baseline."""
    rank = record_file.rank_record(ledger, 0)
    return baseline.Baseline(
        config=[],
        mode=baseline.TEST,
        device=ledger.device,
        world=1,
        model=baseline.Model(name=name, parameters=None, dtype=None),
        made_by=baseline.made_by(record_file.environment().packages),
        ranks=[baseline.Ranks(ranks="0", **dict(baseline.accounting_of(rank)))],
    )


def text_of(ledger: "Ledger", marks: Iterable[Mark], root: Path) -> str:
    """The test's memory: each category, its budget, and the largest storages with the lines that allocated them."""
    peak, own_peaks, budgets = ledger.peak, _own_peaks(ledger), limits(marks)
    where = f"step {peak.where.step}, {peak.where.phase}{f', in {peak.module}' if peak.module else ''}"
    table = Table(["at the peak"], ["its own peak"], ["budget"])
    table.section(f"{ledger.device}, at most in {where}")
    at_peak: dict[str, int | None] = {**peak.categories, "total": peak.bytes, "saved": peak.saved}
    for name in BUDGETED:
        if own_peaks[name] or name in budgets:
            budget = size(budgets[name]) if name in budgets else ""
            table.row(f"  {name}", size(at_peak[name]), size(own_peaks[name]), budget)
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
