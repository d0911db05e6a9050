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

NEAR = 1.1
"""What is expected to need less than so many times the least is rehearsed too."""

MOST_NEAR = 4
"""The most that are rehearsed as they are near the least."""


class Lowest:
    """Whether anything fits with the lowest value of the searched key: what a few layers let expect is not rehearsed,
    and of the others the first config that fits ends it.
    """

    def __init__(self, times: float = 1.0) -> None:
        self.times = times
        """How many times what is expected a rehearsal is taken to come to."""
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
        expected = [(nbytes, each) for each in left if (nbytes := each.expected_bytes(value))]
        self.expected = min(expected, key=lambda pair: pair[0], default=None)
        if self.expected and self.expected[0] * self.times <= trials.room:
            return
        some = lean if self.expected else left  # of a large model stages have no estimate
        unknown = [each for each in some if not each.few]
        while unknown and not any(trial.fits for trial in trials.all):
            group, unknown = unknown[: trials.at_once], unknown[trials.at_once :]
            await asyncio.gather(*(trials.rehearse(each, value) for each in group))


class Leanest:
    """Whether what is expected to need least fits: it is rehearsed with the lowest value of the searched key, and so is
    what is expected to need nearly as little.
    """

    def __init__(self) -> None:
        self.not_tried: list[Combination] = []
        """What may fit too, and is expected to need more; it may be cheaper."""

    async def __call__(self, trials: Trials) -> None:
        """Search in `trials`."""
        left, lowest = await trials.not_ruled_out(trials.combinations), trials.request.lowest
        await trials.estimate(leanest(left))
        expected = {each: nbytes for each in left if (nbytes := each.expected_bytes(lowest)) is not None}
        least = min(expected.values(), default=0)
        near = sorted(
            (each for each in expected if expected[each] <= NEAR * least), key=lambda each: expected[each]
        )
        await asyncio.gather(*(trials.rehearse(each, lowest) for each in near[:MOST_NEAR]))
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
            trials.times = 1.0  # with other recomputation a GPU's allocator has more or less beside
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
    # the cost that none is below: in training no other has a larger micro-batch
    least = min(each.expected_cost for each in lean) if trials.request.mode == "train" else ()
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
    before = len(trials.came_to)
    await trials.climb(combination)
    if combination.largest is None:
        trials.times = max(trials.times, *trials.came_to[before:], 1.0)
    return combination.largest is not None


def _best(trials: Trials, group: Sequence[Combination]) -> Combination | None:
    """The cheapest of those that are expected to fit, of equals the first."""
    expected = [each for each in group if each.few and trials.may_fit(each)]
    return min(expected, key=lambda each: each.expected_cost, default=None)
