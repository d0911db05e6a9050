"""`harness.baseline/1`: the memory of a run, in a file that is easy to review.

Every figure is in bytes, one row of figures a line. A phase lists only the categories that are not 0. People write
`tolerance`, and updates keep it: how far a category may be off, as `{"activations": "1%", "workspace": "64KiB"}`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from harness.analysis.moves.transfers import gaps, largest
from harness.check.tolerance import tolerances
from harness.record import memory, record_file
from harness.record.fields import Bytes, Difference, Operations, Part, Text
from harness.record.memory import Named, Place
from harness.record.schema import Record, validated
from harness.runtime.files import put

SCHEMA = "harness.baseline/1"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate")
"""The packages whose versions change the bytes."""
BY_MACHINE = ("precision",)
"""Keys whose `auto` may resolve differently on another machine. A baseline stores the resolved value."""
TEST = "test"
"""The mode of a test's baseline, which the pytest plugin makes. It has no config."""
ROWS = 4
"""The depth at which a baseline's file writes each value on one line."""


class _Part(Part, extra="forbid"):
    """A part of a file that people review and edit: an unknown key is an error."""


def numbers_in(text: str) -> list[int]:
    """The rank numbers in a text such as `0-3,6`. Raises ValueError."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError("should be ranks, as 0-3,6")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers


def rank_ranges(numbers: Iterable[int]) -> str:
    """The rank numbers as a text such as `0-3,6`."""
    ordered = sorted(numbers)
    starts = [ordered[0], *(right for left, right in pairwise(ordered) if right != left + 1)]
    ends = [*(left for left, right in pairwise(ordered) if right != left + 1), ordered[-1]]
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in zip(starts, ends, strict=True))


def _ranks(text: str) -> str:
    numbers_in(text)
    return text


class Phase(Place, extra="forbid"):
    """The most bytes alive in a phase, and their categories."""

    peak: Bytes
    categories: dict[Text, Bytes]

    @property
    def place(self) -> Place:
        """Its position in the run."""
        return Place(step=self.step, phase=self.phase, micro_batch=self.micro_batch)


class Holding(Named, extra="forbid"):
    """The bytes at the peak under one name, summed over the layers."""


class Allocator(_Part):
    """The allocator's own peak, the scratch of kernels in it, and the bytes that the ledger cannot explain."""

    peak: Bytes
    kernel: Bytes
    unattributed: Difference


class Moved(_Part):
    """The payload that an operation moved over a link in all phases of one name, of the steps that have phases here.

    `cause` is what most of it was for; the file does not have it.
    """

    phase: Text
    operation: Text
    link: Text | None
    bytes: Operations
    cause: Text = Field(default="", exclude=True)


class Accounting(_Part):
    """The accounting of one rank: each category's [peak, end], every phase in order, the largest at the peak.

    `reserved` is what a GPU's allocator had in segments at most, `traffic` what moved; each is left out of the file
    where it is not known, or not all of it is.
    """

    categories: dict[Text, Annotated[list[Bytes], Field(min_length=2, max_length=2)]]
    allocator: Allocator | None = None
    reserved: Bytes | None = None
    phases: list[Phase]
    holdings: list[Holding] = Field(default_factory=list)
    traffic: list[Moved] | None = None

    @property
    def highest(self) -> tuple[Bytes, Place | None]:
        """The highest peak of any phase, in bytes, and the phase's place."""
        top = max(self.phases, key=lambda phase: phase.peak, default=None)
        return (top.peak, top.place) if top else (0, None)


class Ranks(Accounting):
    """Ranks with the same accounting."""

    ranks: Annotated[str, AfterValidator(_ranks)]


def _apart(groups: list[Ranks]) -> list[Ranks]:
    numbers = [number for each in groups for number in numbers_in(each.ranks)]
    if len(set(numbers)) < len(numbers):
        raise ValueError("a rank is in two groups")
    return groups


class Model(_Part):
    """The model that ran."""

    name: Text
    parameters: Bytes | None
    dtype: Text | None


class Baseline(_Part):
    """The expected memory of a run; also a measured run in the same form."""

    config: list[Text]
    """The overrides that reproduce the run, without those of its world and its directory."""
    mode: Text
    device: Text
    world: Annotated[int, Field(ge=1, le=2**20)]
    model: Model
    made_by: dict[Text, Text | None]
    tolerance: dict[Text, Text] = Field(default_factory=dict)
    ranks: Annotated[list[Ranks], Field(min_length=1), AfterValidator(_apart)]

    @cached_property
    def by_rank(self) -> Mapping[int, Ranks]:
        """The accounting of each measured rank."""
        return {number: each for each in self.ranks for number in numbers_in(each.ranks)}


def of(run: Record, source: str) -> Baseline:
    """The memory of each measured rank of `run`. Raises ValueError, with `source`, for a run that is no measurement."""
    if run.status != "complete":
        reason = run.failure.error if run.failure else None
        raise ValueError(
            f"{source}: the run failed ({reason or 'its record does not say why'}); only a complete run counts"
        )
    steps = run.value("ledger.steps")
    steps = steps if isinstance(steps, int) else None
    by_memory: dict[str, tuple[Accounting, list[int]]] = {}
    for rank in sorted(run.ranks, key=lambda rank: rank.rank):
        measured = accounting_of(rank, steps)
        if not measured.phases or not measured.categories:
            raise ValueError(
                f"{source}: nothing of rank {rank.rank} was measured exactly; ledger=exact measures it"
            )
        by_memory.setdefault(measured.model_dump_json(), (measured, []))[1].extend(rank.numbers)
    if not by_memory:
        raise ValueError(f"{source}: it has the accounting of no rank")
    alike = (Ranks(ranks=rank_ranges(numbers), **dict(measured)) for measured, numbers in by_memory.values())
    return Baseline(
        config=[*_overrides(run)],
        mode=run.mode,
        device=run.world.device,
        world=run.world.size,
        model=Model(name=run.model.name, parameters=run.model.parameters, dtype=run.model.dtype),
        made_by=made_by(run.environment.packages),
        ranks=[*alike],
    )


def made_by(versions: Mapping[str, str | None]) -> dict[str, str | None]:
    """The versions of the packages that change the bytes."""
    return {name: versions.get(name) for name in PACKAGES}


def _overrides(run: Record) -> Iterator[str]:
    """The run's overrides without those of its world and directory, plus the values that its machine resolved."""
    resolved = {key: run.value(key) for key in BY_MACHINE if key in run.resolved}
    for argument in run.environment.command:
        key = argument.partition("=")[0].lstrip("+~")
        if key != "world" and not key.startswith(("world.", "hydra.")) and key not in resolved:
            yield argument
    yield from (f"{key}={value}" for key, value in resolved.items())


def accounting_of(rank: memory.Rank, steps: int | None = None) -> Accounting:
    """What was measured exactly on `rank`; of the phases only those of the first `steps`."""
    allocator, kernel = rank.allocator, rank.peak.categories.get("kernel")
    allocator_figures = None
    if allocator.peak is not None and allocator.unattributed is not None and kernel is not None:
        allocator_figures = Allocator(peak=allocator.peak, kernel=kernel, unattributed=allocator.unattributed)
    return Accounting(
        categories={
            name: [figures.peak, figures.end]
            for name, figures in rank.categories.items()
            if figures.peak is not None and figures.end is not None
        },
        allocator=allocator_figures,
        reserved=allocator.reserved,
        phases=[
            _phase(each)
            for each in rank.phases
            if each.peak is not None and (steps is None or each.step < steps)
        ],
        holdings=[*_holdings(rank.peak.holdings or [])],
        traffic=None if rank.traffic is None or gaps(rank) else [*_traffic(rank.traffic, steps)],
    )


def _traffic(rows: Sequence[memory.Transfer], steps: int | None) -> Iterator[Moved]:
    """What moved in the first `steps`. Without what set-up reads, because a rehearsal reads no weights."""
    alike: dict[tuple[str, str, str | None], list[memory.Transfer]] = {}
    for row in rows:
        if (steps is None or row.step < steps) and (row.phase, row.operation) != ("setup", "read"):
            alike.setdefault((row.phase, row.operation, row.link), []).append(row)
    for (phase, operation, link), moved in alike.items():
        [(cause, _)] = largest(moved, 1) or [("", 0)]
        total = sum(row.bytes for row in moved)
        yield Moved(phase=phase, operation=operation, link=link, bytes=total, cause=cause)


def _phase(phase: memory.Phase) -> Phase:
    categories = {name: bytes_ for name, bytes_ in phase.categories.items() if bytes_}
    return Phase(
        step=phase.step,
        phase=phase.phase,
        micro_batch=phase.micro_batch,
        peak=phase.peak or 0,
        categories=categories,
    )


def _holdings(holdings: Sequence[memory.Holding]) -> Iterator[Holding]:
    """Holdings of all layers summed by their pattern, the largest first."""
    sizes: dict[tuple[str, str], int] = {}
    for holding in holdings:
        key = holding.category, holding.pattern
        sizes[key] = sizes.get(key, 0) + holding.bytes
    for category, name in sorted(sizes, key=lambda key: (-sizes[key], key)):
        yield Holding(category=category, name=name, bytes=sizes[category, name])


def read(file: Path) -> Baseline:
    """The baseline in `file`. Raises ValueError with a sentence where it cannot be read."""
    tree = record_file.tree(file, SCHEMA, f"{file}: there is no baseline; --update makes one from a run")
    del tree["schema"]
    baseline = validated(Baseline, tree, str(file), "baseline")
    tolerances(baseline.tolerance, f"{file}: tolerance.")
    return baseline


def write(file: Path, baseline: Baseline) -> None:
    """Write `baseline` to `file` atomically. Raises ValueError with a sentence where it cannot."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        put(file, text(baseline))
    except OSError as error:
        raise ValueError(f"{file}: it cannot be written: {error.strerror}") from None


def update(file: Path, measured: Baseline, tolerance: Mapping[str, str]) -> str:
    """Write `measured` to `file`, with the file's tolerances and the new ones in `tolerance`; raises as `write` does.

    Returns "unchanged", "rewritten" or "made".
    """
    old = read(file) if file.exists() else None
    new = measured.model_copy(update={"tolerance": {**(old.tolerance if old else {}), **tolerance}})
    if old is not None and text(old) == text(new):
        return "unchanged"
    write(file, new)
    return "rewritten" if old else "made"


def text(baseline: Baseline) -> str:
    """The text of a baseline's file. The same figures always give the same text."""
    ranks = [{"ranks": each.ranks, **_figures(each)} for each in baseline.ranks]
    return _format({"schema": SCHEMA, **baseline.model_dump(exclude={"ranks"}), "ranks": ranks}, ROWS) + "\n"


def _figures(ranks: Ranks) -> dict[str, Any]:
    unknown = {name for name in ("reserved", "traffic") if getattr(ranks, name) is None}
    return ranks.model_dump(exclude={"ranks", *unknown})


def _format(value: Any, levels: int, indent: str = "") -> str:
    if not levels or not value or not isinstance(value, (dict, list)):
        return json.dumps(value)
    inner = f"{indent} "
    if isinstance(value, dict):
        rows = [f"{json.dumps(key)}: {_format(each, levels - 1, inner)}" for key, each in value.items()]
    else:
        rows = [_format(each, levels - 1, inner) for each in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}\n" + ",\n".join(f"{inner}{row}" for row in rows) + f"\n{indent}{last}"
