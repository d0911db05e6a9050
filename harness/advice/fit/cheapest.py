"""The searches of `harness fit` where the world's size is open: whether anything fits, and the cheapest that does.

Of what values alone let expect, the leanest is estimated first: where that is not expected to fit, the others are not
either.
"""

import asyncio
from collections.abc import Sequence

from harness.advice.fit.combination import Combination
from harness.advice.fit.leanest import leanest
from harness.advice.fit.ranking import of_any_batch
from harness.advice.fit.trials import Trials


class Lowest:
    """Whether anything fits with the lowest value of the searched key: what a few layers let expect is not rehearsed,
    and of the others the first config that fits ends it.
    """

    def __init__(self) -> None:
        self.expected: tuple[int, Combination] | None = None
        """The fewest bytes that a few layers let expect, and of what."""

    async def __call__(self, trials: Trials) -> None:
        """Search in `trials`."""
        left = await trials.not_ruled_out(trials.combinations)
        lean = leanest(left)
        await trials.estimate(lean)
        if not all(each.few for each in lean):
            await trials.estimate(left)
        value = trials.request.lowest
        expected = [(sum(categories.values()), each) for each in left if (categories := each.expected(value))]
        self.expected = min(expected, key=lambda pair: pair[0], default=None)
        if (self.expected and self.expected[0] <= trials.room) or all(each.few for each in lean):
            return
        unknown = [each for each in left if not each.few]
        while unknown and not any(trial.fits for trial in trials.all):
            group, unknown = unknown[: trials.at_once], unknown[trials.at_once :]
            await asyncio.gather(*(trials.rehearse(each, value) for each in group))


class Leanest:
    """Whether what is expected to need least fits: it is rehearsed with the lowest value of the searched key, and on
    other cores what needs a little more.
    """

    def __init__(self) -> None:
        self.not_tried: list[Combination] = []
        """What may fit too, and is expected to need more; it may be cheaper."""

    async def __call__(self, trials: Trials) -> None:
        """Search in `trials`."""
        left = await trials.not_ruled_out(trials.combinations)
        lean = leanest(left)
        await trials.estimate(lean)
        lowest = trials.request.lowest
        lean.sort(key=lambda each: sum((each.expected(lowest) or {}).values()))
        await asyncio.gather(*(trials.rehearse(each, lowest) for each in lean[: trials.at_once]))
        self.not_tried = [each for each in left if not each.trials]


class Cheapest:
    """Only the largest of the combination that is expected to be the cheapest of those that fit; what is expected not
    to fit is not tried.
    """

    def __init__(self) -> None:
        self.not_tried: list[Combination] = []
        """What may fit too, and is expected to be less cheap."""

    async def __call__(self, trials: Trials) -> None:
        """Search in `trials`."""
        left = await trials.not_ruled_out(trials.combinations)
        groups: dict[tuple[float, ...], list[Combination]] = {}
        for each in left:
            groups.setdefault(of_any_batch(trials.lowest(each)), []).append(each)
        for _, group in sorted(groups.items()):
            if await _cheapest_of(trials, group):
                break
        else:
            for each in filter(trials.may_fit, left):  # stages, of which a few layers say nothing
                if await _fits(trials, each):
                    break
        self.not_tried = [each for each in left if trials.may_fit(each)]


async def _cheapest_of(trials: Trials, group: Sequence[Combination]) -> bool:
    """Climb in those of `group` that are expected to fit, the cheapest first, until something does. In the user's order
    the next are estimated only as long as one may be cheaper.
    """
    lean = leanest(group)
    await trials.estimate(lean)
    if not any(map(trials.may_fit, lean)):
        for each in group:
            each.hopeless = True
    least = min(each.expected_cost for each in lean)  # no other can have a larger value
    left, waiting = [*group], [each for each in group if each not in lean and not each.hopeless]
    while (best := _best(trials, left)) or waiting:
        if waiting and not (
            best and best.expected_cost <= least and group.index(best) < group.index(waiting[0])
        ):
            now, waiting = waiting[: trials.at_once], waiting[trials.at_once :]
            await trials.estimate(now)
        elif best:
            if await _fits(trials, best):
                return True
            left.remove(best)
    return False


async def _fits(trials: Trials, combination: Combination) -> bool:
    """Whether something of `combination` fits, by rehearsals. Where it does not, the others are taken to need as many
    times more than what is expected: what a GPU's allocator has beside.
    """
    lowest = trials.request.lowest
    expected = sum((combination.expected(lowest) or {}).values())
    await trials.climb(combination)
    for trial in combination.trials:
        if trial.rehearsed and trial.value == lowest and not trial.fits and expected:
            trials.times = max(trials.times, trial.worst.needs / expected)
    return combination.largest is not None


def _best(trials: Trials, group: Sequence[Combination]) -> Combination | None:
    """The cheapest of those that are expected to fit, of equals the first."""
    expected = [each for each in group if each.few and trials.may_fit(each)]
    return min(expected, key=lambda each: each.expected_cost, default=None)
