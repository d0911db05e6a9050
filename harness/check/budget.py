"""What a test held, held against what it may: the sentences that pytest's plugin fails with."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.check import announce, baseline
from harness.check.tolerance import tolerances
from harness.check.verdict import judge
from harness.ledger.categories import CATEGORIES
from harness.record import record_file, schema
from harness.tables import Table, parse_size, size

if TYPE_CHECKING:
    from harness.ledger import Gap, Ledger

BUDGETED = (*CATEGORIES, "total", "saved")
"""Each category's own peak, the peak of them all, and the most of the activations that was kept for backward."""
UNOWNED = ("activations", "workspace", "communication", "inputs")
"""Of those, what is known by the operator that made it."""
LARGEST = 8
"""How many holdings a failed test shows."""
AGAIN = "once that is meant, --memory-update makes it the baseline"


class Mark(Protocol):
    """A pytest mark."""

    @property
    def args(self) -> tuple[Any, ...]:
        """What it was given by place."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """What it was given by name."""


def limits(marks: Iterable[Mark]) -> dict[str, int]:
    """Bytes by name, of marks of which the first is the closest to the test. Raises ValueError with a sentence."""
    found: dict[str, int] = {}
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
                found.setdefault(name, parse_size(str(amount)))
            except ValueError as error:
                raise ValueError(f"memory_budget({name}={amount!r}): {error}") from None
    return found


def _held(ledger: "Ledger") -> dict[str, int | None]:
    """What can have a budget, at its own peak, in bytes. None: not measured.

    What a compiled program holds inside is in no storage that is seen, so the total is then the allocator's.
    """
    own = {name: category.peak for name, category in ledger.categories.items()}
    total: int | None = ledger.peak.bytes
    if any(gap.figures == "storages" for gap in ledger.gaps):
        total = ledger.allocator.peak
    return {**own, "total": total, "saved": ledger.saved}


def exceeded(ledger: "Ledger", limits: Mapping[str, int]) -> Iterator[str]:
    """A sentence for each limit that was passed, or that nobody can say it was kept."""
    held = _held(ledger) if limits else {}
    for name, limit in limits.items():
        what = {"total": "the test", "saved": "what is saved for backward"}.get(name, name)
        most = held[name]
        if most is not None and most > limit:
            over = size(most - limit)
            yield f"{what} held {size(most)} at its peak, {over} over its budget of {size(limit)}"
        elif (gap := _gap(ledger, name)) is not None:
            heard = gap.figures == "storages" and ledger.allocator.peak is not None
            instead = "; total can, by the allocator" if heard else ""
            yield f"memory_budget({name}={size(limit)!r}) cannot be judged{instead}: {gap.sentence}"


def _gap(ledger: "Ledger", name: str) -> "Gap | None":
    """Why nobody can say what `name` held at most."""
    lacks = {"all"} | ({name} & {"saved"})
    if name in UNOWNED or (name == "total" and ledger.allocator.peak is None):
        lacks.add("storages")
    return next((gap for gap in ledger.gaps if gap.figures in lacks), None)


def off_baseline(ledger: "Ledger", file: Path, name: str, update: bool, root: Path) -> Iterator[str]:
    """What of the test `name` is not as `file` says; with `update` nothing, for the file is written."""
    shown = file.relative_to(root) if file.is_relative_to(root) else file
    try:
        if gap := next((gap for gap in ledger.gaps if gap.figures != "allocator"), None):
            raise ValueError(f"{shown}: the test has no baseline to hold: {gap.sentence}")
        held = _measured(ledger, name)
        if update:
            baseline.update(file, held, {})
        elif not file.exists():
            yield f"{shown}: there is no baseline; run with --memory-update to make it"
        else:
            expected = baseline.read(file)
            allowed = tolerances(expected.tolerance, "")
            verdict = judge(shown, expected, held, {}, allowed)
            if verdict.code:
                yield announce.text([verdict], AGAIN)
    except ValueError as error:
        yield str(error)


def _measured(ledger: "Ledger", name: str) -> baseline.Baseline:
    """What the test `name` held, as a file of baselines has it."""
    rank = schema.Rank.model_validate(record_file.rank_record(ledger, 0))
    return baseline.Baseline(
        config=[],
        mode=baseline.TEST,
        device=ledger.device,
        world=1,
        model=baseline.Model(name=name, parameters=None, dtype=None),
        made_by=baseline.made_by(record_file.environment()["packages"]),
        ranks=[baseline.Ranks(ranks="0", **dict(baseline.books_of(rank)))],
    )


def text_of(ledger: "Ledger", marks: Iterable[Mark], root: Path) -> str:
    """What the test held: each category, its budget, and the largest storages with the lines that made them."""
    peak, held, allowed = ledger.peak, _held(ledger), limits(marks)
    where = f"step {peak.where.step}, {peak.where.phase}{f', in {peak.module}' if peak.module else ''}"
    table = Table(["at the peak"], ["its own peak"], ["budget"])
    table.section(f"{ledger.device}, at most in {where}")
    at_peak: dict[str, int | None] = {**peak.categories, "total": peak.bytes, "saved": peak.saved}
    for name in BUDGETED:
        if held[name] or name in allowed:
            budget = size(allowed[name]) if name in allowed else ""
            table.row(f"  {name}", size(at_peak[name]), size(held[name]), budget)
    largest = [each for each in peak.holdings if each.name != "others"][:LARGEST]
    rows = [
        f"  {size(each.bytes):>10}   {each.category}: {each.name}{f' x {each.storages}' if each.storages > 1 else ''}"
        f"   {_shown(each.line, root)}".rstrip()
        for each in largest
    ]
    return "\n".join([table.text(), *(["largest then, and the line that made it", *rows] if rows else [])])


def _shown(line: str, root: Path) -> str:
    """`line` from the project's root, or from the installed packages' directory."""
    _, installed, rest = line.rpartition("site-packages/")
    if installed:
        return rest
    return line.removeprefix(f"{root}/")
