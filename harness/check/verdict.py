"""Compares a run with its baseline: which figures differ, by how much, on which ranks, since which phase, and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.check.baseline import Accounting, Baseline, rank_ranges
from harness.check.tolerance import NONE, TRAFFIC, Tolerance
from harness.config.refusal import as_typed
from harness.record.fields import flat, printable
from harness.tables import difference, size

GROWN = 3
"""How many holdings are named."""


class Change(NamedTuple):
    """A figure that differs from the baseline, in bytes: a category's `peak` or `end`, or its bytes in a phase."""

    name: str
    figure: str
    before: int
    after: int
    since: str = ""
    """The first phase in which the category differs, and the number of such phases."""
    cause: str = ""
    """What most of it was for, where it is traffic."""

    @property
    def more(self) -> int:
        """Bytes above the baseline."""
        return self.after - self.before

    def sentence(self) -> str:
        """The distance from the baseline, as text."""
        return f"{difference(self.before, self.after)}{f' ({self.share})' if self.share else ''}"

    @property
    def share(self) -> str:
        """The distance in percent of the baseline's figure; empty where that figure is 0 or the result rounds to 0."""
        share = f"{self.more / self.before:+.2%}" if self.before else ""
        return "" if share[1:] == "0.00%" else share


class Apart(NamedTuple):
    """Ranks that differ from the baseline in the same way."""

    ranks: str
    changes: tuple[Change, ...]
    phases: tuple[str, ...]
    """The phases that only one side has, as text."""
    holdings: tuple[Change, ...]
    """The holdings at the peak that are furthest from the baseline, in the categories that changed."""
    moved: str = ""
    """The place of the peak, as text; empty if the baseline's peak is in the same place."""

    @property
    def largest(self) -> Change | None:
        """The most important change: the largest one, with changes of a peak before all others."""
        return max(self.changes, key=lambda each: (each.figure == "peak", abs(each.more)), default=None)

    def headline(self) -> str:
        """The difference in one line."""
        change = self.largest
        if change is None:
            return f"{self.ranks}: {self.phases[0]}"
        since = f", since {change.since}" if change.since else ""
        return f"{self.ranks}: {change.name} {change.sentence()}{since}"


@dataclass(frozen=True)
class Verdict:
    """The result of checking one baseline."""

    file: Path
    measured: str = ""
    """What was compared, as text."""
    apart: tuple[Apart, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str = ""
    """Why the baseline could not be checked; empty if it was."""
    crashed: bool = False
    """Whether its rehearsal failed, which no wrong request explains."""
    written: str = ""
    """What an update did: "made", "rewritten" or "unchanged"; empty without an update."""
    seconds: float | None = None
    """The rehearsal's time."""

    @property
    def name(self) -> str:
        """The baseline's name: that of its file."""
        return printable(self.file.stem)

    @property
    def code(self) -> int:
        """The exit code: 0 it holds or was written, 1 it does not, 2 it was not checked, 3 its rehearsal failed."""
        if self.failure:
            return 3 if self.crashed else 2
        return 1 if self.apart and not self.written else 0

    @property
    def word(self) -> str:
        """The verdict in a word."""
        return self.written or ("holds", "NO", "not checked", "not checked")[self.code]

    def headline(self) -> str:
        """The verdict in one line."""
        return self.failure or ("; ".join(each.headline() for each in self.apart) or self.measured)


def judge(
    file: Path,
    baseline: Baseline,
    run: Baseline,
    tree: Mapping[str, Any],
    tolerances: Mapping[str, Tolerance],
) -> Verdict:
    """Compare `run`, whose config is `tree`, with the `baseline` in `file`, on the ranks that both have measured.

    Raises ValueError where the two are not comparable, and Refusal where the baseline's overrides are no valid config
    any more.
    """
    _comparable(file, baseline, run)
    common = sorted(baseline.by_rank.keys() & run.by_rank.keys())
    if not common:
        measured = rank_ranges(run.by_rank)
        raise ValueError(
            f"{file}: it has figures of ranks {rank_ranges(baseline.by_rank)}, the run of {measured} only"
        )
    apart = tuple(_apart(baseline, run, common, tolerances))
    unseen = {*range(baseline.world)}.difference(common)
    notes = [f"{_ranks(unseen)} not measured on both sides, and not compared"] if unseen else []
    notes += _uncompared_traffic(baseline, run, common)
    if apart:
        notes += _causes(baseline, run, tree)
    peak = max(run.by_rank[number].highest[0] for number in common)
    phases = len({phase.place for number in common for phase in run.by_rank[number].phases})
    measured = f"{_ranks(common)}: {size(peak)} at most, {phases} phases"
    return Verdict(file, measured, apart, tuple(notes))


def _comparable(file: Path, baseline: Baseline, run: Baseline) -> None:
    for key, expected, measured in (
        ("mode", baseline.mode, run.mode),
        ("model.name", baseline.model.name, run.model.name),
        ("world.size", baseline.world, run.world),
        ("device", baseline.device, run.device),
    ):
        if expected != measured:
            raise ValueError(
                f"{key}={measured}: {file} is a baseline of {key}={expected}; name another, or --update it"
            )


def _ranks(numbers: Sequence[int] | set[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {rank_ranges(numbers)}"


def _apart(
    baseline: Baseline, run: Baseline, common: Sequence[int], tolerances: Mapping[str, Tolerance]
) -> Iterator[Apart]:
    """The differences, one for each group of ranks that differ in the same way."""
    compared: dict[tuple[str, str], Apart] = {}
    ranks_by_difference: dict[Apart, list[int]] = {}
    for number in common:
        before, after = baseline.by_rank[number], run.by_rank[number]
        pair = before.ranks, after.ranks
        if pair not in compared:
            compared[pair] = _between(before, after, tolerances)
        if compared[pair].changes or compared[pair].phases:
            ranks_by_difference.setdefault(compared[pair], []).append(number)
    for apart, numbers in ranks_by_difference.items():
        yield apart._replace(ranks=_ranks(numbers))


def _between(before: Accounting, after: Accounting, tolerances: Mapping[str, Tolerance]) -> Apart:
    changes = tuple(_changes(before, after, tolerances))
    # reversed: a category's peak comes before its end, and must win
    grew = {change.name: change.more > 0 for change in reversed(changes)}
    holdings = _holdings(before, after, grew)
    place_before, place_after = before.highest[1], after.highest[1]
    moved = (
        f"{place_after}, the baseline's in {place_before}"
        if place_after and place_before and place_after != place_before
        else ""
    )
    return Apart("", changes, tuple(_phase_differences(before, after)), tuple(holdings), moved)


def _changes(before: Accounting, after: Accounting, tolerances: Mapping[str, Tolerance]) -> Iterator[Change]:
    """Every figure outside its tolerance, in the order of the categories."""
    phases = (name for side in (before, after) for phase in side.phases for name in phase.categories)
    names = list(dict.fromkeys([*before.categories, *after.categories, *phases]))
    phases_before = {phase.place: phase.categories for phase in before.phases}
    phases_after = {phase.place: phase.categories for phase in after.phases if phase.place in phases_before}
    for name in names:
        tolerance = tolerances.get(name, NONE)
        moved = [
            Change(name, str(place), phases_before[place].get(name, 0), categories.get(name, 0))
            for place, categories in phases_after.items()
            if not tolerance.allows(phases_before[place].get(name, 0), categories.get(name, 0))
        ]
        # idle is all the time between the other phases: name those first
        moved.sort(key=lambda change: "idle" in change.figure)
        since = f"{moved[0].figure} ({len(moved)} of {len(phases_after)} phases)" if moved else ""
        pairs = zip(before.categories.get(name, [0, 0]), after.categories.get(name, [0, 0]), strict=True)
        own = [
            Change(name, figure, old, new, since)
            for figure, (old, new) in zip(("peak", "end"), pairs, strict=True)
            if not tolerance.allows(old, new)
        ]
        yield from own or [moved[0]._replace(since=since) for _ in moved[:1]]
    for name, old, new in _allocators(before, after):
        if not tolerances.get(name, NONE).allows(old, new):
            yield Change(name, "peak", old, new)
    yield from _traffic(before, after, tolerances.get(TRAFFIC, NONE))


def _allocators(before: Accounting, after: Accounting) -> Iterator[tuple[str, int, int]]:
    """The figures of an allocator that both sides have."""
    if before.allocator and after.allocator:
        for name, attribute in (("allocator", "peak"), ("kernel",) * 2, ("unattributed",) * 2):
            yield name, getattr(before.allocator, attribute), getattr(after.allocator, attribute)
    if before.reserved is not None and after.reserved is not None:
        yield "reserved", before.reserved, after.reserved


def _traffic(before: Accounting, after: Accounting, tolerance: Tolerance) -> Iterator[Change]:
    """What moved more or less than the tolerance allows, by phase, operation and link; where both sides have it."""
    if before.traffic is None or after.traffic is None:
        return
    old, new = (
        {(each.phase, each.operation, each.link): each for each in side.traffic or ()}
        for side in (before, after)
    )
    for key in dict.fromkeys([*old, *new]):
        earlier, later = (side[key].bytes if key in side else 0 for side in (old, new))
        if not tolerance.allows(earlier, later):
            phase, operation, link = key
            name = f"{operation} in {phase}{f' over {link}' if link else ''}"
            yield Change(name, TRAFFIC, earlier, later, cause=new[key].cause if key in new else "")


def _uncompared_traffic(baseline: Baseline, run: Baseline, common: Sequence[int]) -> Iterator[str]:
    """A sentence where only one side has traffic."""
    counted = [any(side.by_rank[number].traffic is not None for number in common) for side in (baseline, run)]
    if counted == [False, True]:
        yield "its traffic is not in the baseline; --update adds it"
    elif counted == [True, False]:
        yield "the run has no traffic counted, and the baseline's is not compared"


def _phase_differences(before: Accounting, after: Accounting) -> Iterator[str]:
    """The phases that only one side has."""
    places_before, places_after = ([phase.place for phase in side.phases] for side in (before, after))
    for subject, places in (
        ("the run has not", [place for place in places_before if place not in places_after]),
        ("the baseline has not", [place for place in places_after if place not in places_before]),
    ):
        if places:
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            yield f"{subject}: {places[0]}{more}"


def _holdings(before: Accounting, after: Accounting, grew: Mapping[str, bool]) -> Iterator[Change]:
    """The holdings at the peak that changed in the direction of their category, the largest change first.

    `grew` says of each changed category whether it grew or shrank.
    """
    bytes_before, bytes_after = (
        {(each.category, each.name): each.bytes for each in side.holdings} for side in (before, after)
    )
    changes = [
        Change(name, category, bytes_before.get((category, name), 0), bytes_after.get((category, name), 0))
        for category, name in bytes_before.keys() | bytes_after.keys()
        if category in grew
    ]
    changes.sort(key=lambda each: (-abs(each.more), each.figure, each.name))
    same_way = [each for each in changes if each.more and (each.more > 0) == grew[each.figure]]
    yield from same_way[:GROWN]


def _causes(baseline: Baseline, run: Baseline, tree: Mapping[str, Any]) -> Iterator[str]:
    """What else differs: keys of the config, versions of packages, the model itself."""
    keys = [*config_changes(baseline.config, tree)]
    versions = [
        f"{name} {run.made_by.get(name)}, the baseline's {version}"
        for name, version in baseline.made_by.items()
        if run.made_by.get(name) != version
    ]
    models = [
        f"model {key}: {measured}, the baseline's {expected}"
        for key, expected in baseline.model.model_dump().items()
        if (measured := getattr(run.model, key)) != expected
    ]
    if keys:
        yield f"another config: {'; '.join(keys)}"
    yield from models
    if versions:
        yield f"{'' if keys else 'the same config; '}{'; '.join(versions)}"
    if not (keys or versions):
        yield "neither the config nor a version changed: the code did"


def config_changes(overrides: Sequence[str], tree: Mapping[str, Any]) -> Iterator[str]:
    """The keys in which a run's config `tree` differs from the config of `overrides`.

    It leaves out the world's keys, and those that `overrides` leave at `auto`. Raises Refusal for wrong overrides.
    """
    from omegaconf import OmegaConf

    from harness.config import compose
    from harness.config.settings import RESOLVED

    composed: Any = OmegaConf.to_container(compose.compose(overrides), resolve=True)
    expected, measured = dict(flat(composed)), dict(flat(tree))
    left_open = [key for key in RESOLVED if expected.get(key) == "auto"]
    for key in sorted((expected.keys() | measured.keys()).difference(left_open)) if measured else ():
        if not key.startswith(("world.", "hydra.")) and expected.get(key) != measured.get(key):
            yield f"{key}={as_typed(measured.get(key))}, the baseline's {as_typed(expected.get(key))}"
