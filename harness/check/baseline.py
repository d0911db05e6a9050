"""`harness.baseline/1`: what a run held, in a file that reviews well: made from a record, read, written.

Every figure is in bytes, a row of them on a line; of a phase's categories those that are 0 are left out. `tolerance` is
written by people, and kept: how far a category may be off, as `{"activations": "1%", "workspace": "64KiB"}`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from harness.check.tolerance import tolerances
from harness.record import record_file, schema
from harness.record.schema import Bytes, Number, Record, Text, validated

SCHEMA = "harness.baseline/1"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate")
"""Whose versions decide bytes."""
BY_MACHINE = ("precision",)
"""Keys whose `auto` may be another on another machine: a baseline says what it was on the one that made it."""
TEST = "test"
"""The mode of a baseline that is a test's, made by pytest's plugin; it has no config."""
ROWS = 4
"""The level at which a file has a value on a line."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def numbers_in(text: str) -> list[int]:
    """The ranks that `0-3,6` names. Raises ValueError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError("should be ranks, as 0-3,6")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def told_ranks(numbers: Iterable[int]) -> str:
    """The ranks as `0-3,6`."""
    ordered = sorted(numbers)
    starts = [ordered[0], *(right for left, right in pairwise(ordered) if right != left + 1)]
    ends = [*(left for left, right in pairwise(ordered) if right != left + 1), ordered[-1]]
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in zip(starts, ends, strict=True))


def _ranks(text: str) -> str:
    numbers_in(text)
    return text


class Place(NamedTuple):
    """Where a phase is in a run."""

    step: int
    phase: str
    micro_batch: int

    def __str__(self) -> str:
        micro_batch = f" of micro-batch {self.micro_batch}" if self.micro_batch else ""
        return f"step {self.step}, {self.phase}{micro_batch}"


class Phase(_Part):
    """The most bytes that were alive in a phase, and what they were."""

    step: Number
    phase: Text
    micro_batch: Number
    peak: Bytes
    categories: dict[Text, Bytes]

    @property
    def place(self) -> Place:
        """Its name."""
        return Place(self.step, self.phase, self.micro_batch)


class Holding(_Part):
    """What at the peak has one name, that of all layers at once."""

    category: Text
    name: Text
    bytes: Bytes


class Allocator(_Part):
    """The allocator's own peak, what of it was scratch in kernels, and what nobody explains."""

    peak: Bytes
    kernel: Bytes
    unattributed: Annotated[int, Field(gt=-(2**63), lt=2**63)]


class Books(_Part):
    """What a rank held: each category's [peak, end], every phase in order of entry, what was largest at the peak."""

    categories: dict[Text, Annotated[list[Bytes], Field(min_length=2, max_length=2)]]
    allocator: Allocator | None = None
    phases: list[Phase]
    holdings: list[Holding] = []

    @property
    def highest(self) -> tuple[Bytes, Place | None]:
        """The most bytes of any phase, and where they were."""
        top = max(self.phases, key=lambda phase: phase.peak, default=None)
        return (top.peak, top.place) if top else (0, None)


class Ranks(Books):
    """Ranks that held the same."""

    ranks: Annotated[str, AfterValidator(_ranks)]


def _apart(groups: list[Ranks]) -> list[Ranks]:
    numbers = [number for each in groups for number in numbers_in(each.ranks)]
    if len(set(numbers)) < len(numbers):
        raise ValueError("a rank is in two groups")
    return groups


class Model(_Part):
    """What ran."""

    name: Text
    parameters: Bytes | None
    dtype: Text | None


class Baseline(_Part):
    """What a run is held against; or a run, as it would be one."""

    config: list[Text]
    """The words that make it, but for its world's and its directory's."""
    mode: Text
    device: Text
    world: Annotated[int, Field(ge=1, le=2**20)]
    model: Model
    made_by: dict[Text, Text | None]
    tolerance: dict[Text, Text] = {}
    ranks: Annotated[list[Ranks], Field(min_length=1), AfterValidator(_apart)]

    @cached_property
    def by_rank(self) -> Mapping[int, Ranks]:
        """The books of each rank that was measured."""
        return {number: each for each in self.ranks for number in numbers_in(each.ranks)}


def of(run: Record, source: str) -> Baseline:
    """What `run` held, of each rank that was measured. Raises ValueError, with `source`, for one that is no measure."""
    if run.status != "complete":
        told = run.failure.error if run.failure else None
        raise ValueError(
            f"{source}: the run failed ({told or 'its record does not say why'}); only a whole one counts"
        )
    steps = run.config.get("ledger", {}).get("steps")
    books: dict[str, tuple[Books, list[int]]] = {}
    for rank in sorted(run.ranks, key=lambda rank: rank.rank):
        held = books_of(rank, steps)
        if not held.phases or not held.categories:
            raise ValueError(
                f"{source}: nothing of rank {rank.rank} was measured exactly; ledger=exact measures it"
            )
        books.setdefault(held.model_dump_json(), (held, []))[1].extend(rank.numbers)
    if not books:
        raise ValueError(f"{source}: it has the books of no rank")
    alike = (Ranks(ranks=told_ranks(numbers), **dict(held)) for held, numbers in books.values())
    return Baseline(
        config=[*_own(run)],
        mode=run.mode,
        device=run.world.device,
        world=run.world.size,
        model=Model(name=run.model.name, parameters=run.model.parameters, dtype=run.model.dtype),
        made_by=made_by(run.environment.packages),
        ranks=[*alike],
    )


def made_by(versions: Mapping[str, str | None]) -> dict[str, str | None]:
    """Of the packages' versions those that decide bytes."""
    return {name: versions.get(name) for name in PACKAGES}


def _own(run: Record) -> Iterator[str]:
    """Its words, but for those of where it is and what it leaves; and what its machine chose."""
    chosen = {key: run.value(key) for key in BY_MACHINE if key in run.resolved}
    for word in run.environment.command:
        key = word.partition("=")[0].lstrip("+~")
        if key != "world" and not key.startswith(("world.", "hydra.")) and key not in chosen:
            yield word
    yield from (f"{key}={value}" for key, value in chosen.items())


def books_of(rank: schema.Rank, steps: int | None = None) -> Books:
    """What of `rank` was measured exactly; of the phases those of the first `steps`."""
    allocator, kernel = rank.allocator, rank.peak.categories.get("kernel")
    heard = None
    if allocator.peak is not None and allocator.unattributed is not None and kernel is not None:
        heard = Allocator(peak=allocator.peak, kernel=kernel, unattributed=allocator.unattributed)
    return Books(
        categories={
            name: [held.peak, held.end]
            for name, held in rank.categories.items()
            if held.peak is not None and held.end is not None
        },
        allocator=heard,
        phases=[
            _phase(each)
            for each in rank.phases
            if each.peak is not None and (steps is None or each.step < steps)
        ],
        holdings=[*_holdings(rank.peak.holdings or [])],
    )


def _phase(phase: schema.Phase) -> Phase:
    held = {name: bytes_ for name, bytes_ in phase.categories.items() if bytes_}
    return Phase(
        step=phase.step,
        phase=phase.phase,
        micro_batch=phase.micro_batch,
        peak=phase.peak or 0,
        categories=held,
    )


def _holdings(holdings: Sequence[schema.Holding]) -> Iterator[Holding]:
    """Those of all layers as one, the largest first."""
    held: dict[tuple[str, str], int] = {}
    for holding in holdings:
        key = holding.category, holding.pattern
        held[key] = held.get(key, 0) + holding.bytes
    for category, name in sorted(held, key=lambda key: (-held[key], key)):
        yield Holding(category=category, name=name, bytes=held[category, name])


def read(file: Path) -> Baseline:
    """The baseline in `file`. Raises ValueError with a sentence where there is none to read."""
    tree = record_file.tree(file, SCHEMA, f"{file}: there is no baseline; --update makes one from a run")
    del tree["schema"]
    baseline = validated(Baseline, tree, str(file), "baseline")
    tolerances(baseline.tolerance, f"{file}: tolerance.")
    return baseline


def write(file: Path, baseline: Baseline) -> None:
    """Make `file` hold `baseline`, whole or not at all. Raises ValueError with a sentence where it cannot."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        record_file.put(file, text(baseline))
    except OSError as error:
        raise ValueError(f"{file}: it cannot be written: {error.strerror}") from None


def update(file: Path, held: Baseline, given: Mapping[str, str]) -> str:
    """Write `held`, with the tolerances that `file` has and those `given` now; in a word, what that did. As `write`."""
    before = read(file) if file.exists() else None
    after = held.model_copy(update={"tolerance": {**(before.tolerance if before else {}), **given}})
    if before == after:
        return "unchanged"
    write(file, after)
    return "rewritten" if before else "made"


def text(baseline: Baseline) -> str:
    """`baseline` as its file has it: the same figures are the same text."""
    ranks = [{"ranks": each.ranks, **each.model_dump(exclude={"ranks"})} for each in baseline.ranks]
    return (
        _laid_out({"schema": SCHEMA, **baseline.model_dump(exclude={"ranks"}), "ranks": ranks}, ROWS) + "\n"
    )


def _laid_out(value: Any, levels: int, indent: str = "") -> str:
    if not levels or not value or not isinstance(value, (dict, list)):
        return json.dumps(value)
    inner = f"{indent} "
    if isinstance(value, dict):
        rows = [f"{json.dumps(key)}: {_laid_out(each, levels - 1, inner)}" for key, each in value.items()]
    else:
        rows = [_laid_out(each, levels - 1, inner) for each in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}\n" + ",\n".join(f"{inner}{row}" for row in rows) + f"\n{indent}{last}"
