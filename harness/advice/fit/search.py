"""The search of `harness fit` in one world: the largest value that fits of each combination."""

import asyncio
from collections.abc import Sequence

from harness.advice.fit.combination import Combination, short
from harness.advice.fit.ranking import OFFLOADED, RECOMPUTED
from harness.advice.fit.trials import Trials
from harness.tables import size

CHECKPOINTING = "checkpointing="

FIRST = "first answer, expected from a few layers: "


async def search(trials: Trials) -> None:
    """Rehearse the configs that must be; offloaded ones only where nothing else fits."""
    request = trials.request
    await _largest_of_each(trials, trials.combinations)
    if request.mode != "train" or "zero.offload" in request.typed:
        return
    for offload in OFFLOADED[1:]:
        if any(each.known for each in trials.all) and not any(each.fits for each in trials.all):
            await _largest_of_each(trials, trials.more(request.combinations({"zero.offload": offload})))


async def _largest_of_each(trials: Trials, combinations: Sequence[Combination]) -> None:
    """Search the largest value of each combination; those first that are expected to be the cheapest."""
    left = await trials.not_ruled_out(combinations)
    await trials.estimate(left)
    left.sort(key=lambda each: each.expected_cost)
    if any(each.few for each in left):
        trials.say(_first_answer(trials, left[0]))
    chains: dict[tuple[str, ...], list[Combination]] = {}
    for each in left:
        chains.setdefault(_without_recomputation(trials, each), []).append(each)
    await asyncio.gather(*(_with_less_recomputation(trials, chain) for chain in chains.values()))


def _first_answer(trials: Trials, best: Combination) -> str:
    value = best.climb.highest()
    if value is None:
        return f"{FIRST}nothing fits"
    overrides = short([*best.overrides, f"{trials.request.searched}={value}"])
    expected = best.expected_bytes(value)
    return f"{FIRST}{' '.join(overrides)}, about {size(expected)} of {size(trials.room)}"


def _without_recomputation(trials: Trials, combination: Combination) -> tuple[str, ...]:
    """The overrides without `checkpointing`, where the user leaves that open."""
    if "checkpointing" in trials.request.typed:
        return combination.overrides
    return tuple(each for each in combination.overrides if not each.startswith(CHECKPOINTING))


async def _with_less_recomputation(trials: Trials, chain: Sequence[Combination]) -> None:
    """Search in combinations that differ in recomputation: more of it is needed only for values that less of it
    does not reach. Which that are is expected first; where that was wrong, the search goes on.
    """
    chain = sorted(chain, key=_recomputation)
    if all(each.few for each in chain):
        reached = 0
        for each in chain:
            each.climb.needless = reached
            reached = max(reached, each.climb.highest() or 0)
        await asyncio.gather(*map(trials.climb, chain))
    reached = 0
    for each in chain:
        each.climb.needless = reached
        await trials.climb(each)
        each.trials = [trial for trial in each.trials if not trial.fits or trial.value > reached]
        reached = max(reached, each.climb.fits)


def _recomputation(combination: Combination) -> int:
    modes = [f"{CHECKPOINTING}{mode}" for mode in RECOMPUTED]
    return next((modes.index(each) for each in combination.overrides if each in modes), 0)
