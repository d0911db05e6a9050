"""A run held against its baseline: which figures are others, by how much, on which ranks, since when, and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from harness.check.baseline import Baseline, Books, told_ranks
from harness.check.tolerance import NONE, Tolerance
from harness.config import compose
from harness.config.settings import RESOLVED, as_typed
from harness.record.schema import printable
from harness.tables import difference, size

GROWN = 3
"""How many holdings are named."""


class Change(NamedTuple):
    """A figure that is not the baseline's, in bytes: of a category its `peak`, its `end`, or what a phase has of it."""

    name: str
    figure: str
    before: int
    after: int
    since: str = ""
    """The first phase in which the category is another, and how many are."""

    @property
    def more(self) -> int:
        """Bytes above the baseline."""
        return self.after - self.before

    def sentence(self) -> str:
        """How far it is from the baseline."""
        return f"{difference(self.before, self.after)}{f' ({self.share})' if self.share else ''}"

    @property
    def share(self) -> str:
        """The same in parts of the baseline's figure; nothing where that is 0."""
        share = f"{self.more / self.before:+.2%}" if self.before else ""
        return "" if share[1:] == "0.00%" else share


class Apart(NamedTuple):
    """Ranks that hold something else than the baseline, in the same way."""

    ranks: str
    changes: tuple[Change, ...]
    phases: tuple[str, ...]
    """In words: those that only one side has."""
    holdings: tuple[Change, ...]
    """What at the peak, in the categories that changed, is furthest from the baseline, by name."""
    moved: str = ""
    """In words: where the peak is, if the baseline has it elsewhere."""

    @property
    def largest(self) -> Change | None:
        """The change that says the most: the furthest, a category's own peak before all others."""
        return max(self.changes, key=lambda each: (each.figure == "peak", abs(each.more)), default=None)

    def headline(self) -> str:
        """It in a few words."""
        change = self.largest
        if change is None:
            return f"{self.ranks}: {self.phases[0]}"
        since = f", since {change.since}" if change.since else ""
        return f"{self.ranks}: {change.name} {change.sentence()}{since}"


@dataclass(frozen=True)
class Verdict:
    """What came of one baseline."""

    file: Path
    measured: str = ""
    """In words: what was compared."""
    apart: tuple[Apart, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str = ""
    """Why there is nothing to hold against it: then it neither holds nor does not."""
    written: str = ""
    """What an update did."""
    seconds: float | None = None
    """What the rehearsal took."""

    @property
    def name(self) -> str:
        """The baseline's."""
        return printable(self.file.stem)

    @property
    def code(self) -> int:
        """The exit code: 0 it holds or was written, 1 it does not, 2 that cannot be said."""
        return 2 if self.failure else 1 if self.apart and not self.written else 0

    @property
    def word(self) -> str:
        """It as one word."""
        return self.written or ("holds", "NO", "not checked")[self.code]

    def headline(self) -> str:
        """It as one line."""
        return self.failure or ("; ".join(each.headline() for each in self.apart) or self.measured)


def judge(
    file: Path, baseline: Baseline, run: Baseline, tree: Mapping[str, Any], allowed: Mapping[str, Tolerance]
) -> Verdict:
    """Whether `run`, whose config is `tree`, holds what `baseline` in `file` says, as far as both were measured.

    Raises ValueError for two that do not compare, and Refusal where the baseline's own words are no config any more.
    """
    _comparable(file, baseline, run)
    common = sorted(baseline.by_rank.keys() & run.by_rank.keys())
    if not common:
        measured = told_ranks(run.by_rank)
        raise ValueError(
            f"{file}: it has figures of ranks {told_ranks(baseline.by_rank)}, the run of {measured} only"
        )
    apart = tuple(_apart(baseline, run, common, allowed))
    unseen = {*range(baseline.world)}.difference(common)
    notes = [f"{_ranks(unseen)} not measured on both sides, and not compared"] if unseen else []
    if apart:
        notes += _why(baseline, run, tree)
    most = max(run.by_rank[number].highest[0] for number in common)
    phases = len({phase.place for number in common for phase in run.by_rank[number].phases})
    measured = f"{_ranks(common)}: {size(most)} at most, {phases} phases"
    return Verdict(file, measured, apart, tuple(notes))


def _comparable(file: Path, baseline: Baseline, run: Baseline) -> None:
    for key, theirs, ours in (
        ("mode", baseline.mode, run.mode),
        ("model.name", baseline.model.name, run.model.name),
        ("world.size", baseline.world, run.world),
        ("device", baseline.device, run.device),
    ):
        if theirs != ours:
            raise ValueError(
                f"{key}={ours}: {file} is a baseline of {key}={theirs}; name another, or --update it"
            )


def _ranks(numbers: Sequence[int] | set[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {told_ranks(numbers)}"


def _apart(
    baseline: Baseline, run: Baseline, common: Sequence[int], allowed: Mapping[str, Tolerance]
) -> Iterator[Apart]:
    """What differs, once for all ranks that differ in the same way."""
    known: dict[tuple[str, str], Apart] = {}
    alike: dict[Apart, list[int]] = {}
    for number in common:
        before, after = baseline.by_rank[number], run.by_rank[number]
        pair = before.ranks, after.ranks
        if pair not in known:
            known[pair] = _between(before, after, allowed)
        if known[pair].changes or known[pair].phases:
            alike.setdefault(known[pair], []).append(number)
    for apart, numbers in alike.items():
        yield apart._replace(ranks=_ranks(numbers))


def _between(before: Books, after: Books, allowed: Mapping[str, Tolerance]) -> Apart:
    changes = tuple(_changes(before, after, allowed))
    grew = {change.name: change.more > 0 for change in reversed(changes)}  # a peak says more than an end
    holdings = _holdings(before, after, grew)
    theirs, ours = before.highest[1], after.highest[1]
    moved = f"{ours}, the baseline's in {theirs}" if ours and theirs and ours != theirs else ""
    return Apart("", changes, tuple(_lacking(before, after)), tuple(holdings), moved)


def _changes(before: Books, after: Books, allowed: Mapping[str, Tolerance]) -> Iterator[Change]:
    """Every figure that is further from the baseline than is allowed, the categories in their order."""
    phases = (name for side in (before, after) for phase in side.phases for name in phase.categories)
    names = list(dict.fromkeys([*before.categories, *after.categories, *phases]))
    theirs = {phase.place: phase.categories for phase in before.phases}
    ours = {phase.place: phase.categories for phase in after.phases if phase.place in theirs}
    for name in names:
        tolerance = allowed.get(name, NONE)
        moved = [
            Change(name, str(place), theirs[place].get(name, 0), held.get(name, 0))
            for place, held in ours.items()
            if not tolerance.allows(theirs[place].get(name, 0), held.get(name, 0))
        ]
        moved.sort(key=lambda change: "idle" in change.figure)  # it is everything between the others
        since = f"{moved[0].figure} ({len(moved)} of {len(ours)} phases)" if moved else ""
        pairs = zip(before.categories.get(name, [0, 0]), after.categories.get(name, [0, 0]), strict=True)
        own = [
            Change(name, figure, old, new, since)
            for figure, (old, new) in zip(("peak", "end"), pairs, strict=True)
            if not tolerance.allows(old, new)
        ]
        yield from own or [moved[0]._replace(since=since) for _ in moved[:1]]
    if before.allocator and after.allocator:
        for name, attribute in (("allocator", "peak"), ("kernel",) * 2, ("unattributed",) * 2):
            old, new = (getattr(side.allocator, attribute) for side in (before, after))
            if not allowed.get(name, NONE).allows(old, new):
                yield Change(name, "peak", old, new)


def _lacking(before: Books, after: Books) -> Iterator[str]:
    """The phases that only one side has."""
    theirs, ours = ([phase.place for phase in side.phases] for side in (before, after))
    for who, places in (
        ("the run has not", [place for place in theirs if place not in ours]),
        ("the baseline has not", [place for place in ours if place not in theirs]),
    ):
        if places:
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            yield f"{who}: {places[0]}{more}"


def _holdings(before: Books, after: Books, grew: Mapping[str, bool]) -> Iterator[Change]:
    """Names at the peak that went the way of their category, which `grew` or shrank; the furthest first."""
    theirs, ours = (
        {(each.category, each.name): each.bytes for each in side.holdings} for side in (before, after)
    )
    changes = [
        Change(name, category, theirs.get((category, name), 0), ours.get((category, name), 0))
        for category, name in theirs.keys() | ours.keys()
        if category in grew
    ]
    changes.sort(key=lambda each: (-abs(each.more), each.figure, each.name))
    alike = [each for each in changes if each.more and (each.more > 0) == grew[each.figure]]
    yield from alike[:GROWN]


def _why(baseline: Baseline, run: Baseline, tree: Mapping[str, Any]) -> Iterator[str]:
    """What else differs: keys of the config, versions, the model itself."""
    keys = [*config_changes(baseline.config, tree)]
    versions = [
        f"{name} {run.made_by.get(name)}, the baseline's {version}"
        for name, version in baseline.made_by.items()
        if run.made_by.get(name) != version
    ]
    models = [
        f"model {key}: {ours}, the baseline's {theirs}"
        for key, theirs in baseline.model.model_dump().items()
        if (ours := getattr(run.model, key)) != theirs
    ]
    if keys:
        yield f"another config: {'; '.join(keys)}"
    yield from models
    if versions:
        yield f"{'' if keys else 'the same config; '}{'; '.join(versions)}"
    if not (keys or versions):
        yield "neither the config nor a version is another: what changed is the code"


def config_changes(words: Sequence[str], tree: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a run's config `tree` that `words` make others; but for its world, and what they leave to `auto`.

    Raises Refusal for bad words.
    """
    composed: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
    theirs, ours = dict(compose.flat(composed)), dict(compose.flat(tree))
    left_open = [key for key in RESOLVED if theirs.get(key) == "auto"]
    for key in sorted((theirs.keys() | ours.keys()).difference(left_open)) if ours else ():
        if not key.startswith(("world.", "hydra.")) and theirs.get(key) != ours.get(key):
            yield f"{key}={as_typed(ours.get(key))}, the baseline's {as_typed(theirs.get(key))}"
