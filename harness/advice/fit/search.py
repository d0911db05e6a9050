"""The search of `harness fit`: what shapes rule out, what a few layers let expect, and the rehearsals that decide."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from harness.advice.fit.answer import Answer
from harness.advice.fit.combination import NOT_EXPECTED, Combination, Trial, short
from harness.advice.fit.ranking import OFFLOADED, RECOMPUTED, cost
from harness.advice.fit.request import Request
from harness.config.settings import Refusal, Settings
from harness.rehearsal import bounds
from harness.rehearsal.pool import Worst, cores, decided, in_worker, started, workers, worst_of
from harness.runtime.progress import Pace, aside
from harness.tables import size

CHECKPOINTING = "checkpointing="

FIRST = "first answer, expected from a few layers: "


class Search:
    """The search over the configs of a request, and what is known so far. Raises what the request raises."""

    def __init__(self, request: Request) -> None:
        self.request, self.room = request, request.room
        self.combinations: list[Combination] = []
        self.expected: tuple[int, Combination] | None = None
        """After `lowest`: the fewest bytes that a few layers let expect, and of what."""
        self.not_tried: list[Combination] = []
        """After `cheapest`: what may fit too, and is expected to be less cheap."""
        self._at_once = cores()
        self._refusals: list[Refusal] = []

    def run(self) -> Answer:
        """Rehearse the configs that must be, and say what is known then, or where Ctrl-C ends it.

        Raises Refusal where every config is refused, and KeyboardInterrupt where nothing is known.
        """
        return self._answer(self._all)

    def lowest(self) -> Answer:
        """Only whether anything fits with the lowest value of the searched key: what a few layers let expect is not
        rehearsed, and of the others the first config that fits ends it. Raises what `run` does.
        """
        return self._answer(self._any)

    def cheapest(self) -> Answer:
        """Only the largest of the combination that is expected to be the cheapest of those that fit; what is expected
        not to fit is not tried. Raises what `run` does.
        """
        return self._answer(self._cheapest)

    @property
    def expected_to_fit(self) -> bool:
        """Whether something is expected to fit, after `lowest`."""
        return self.expected is not None and self.expected[0] <= self.room

    def _answer(self, search: Callable[[], Coroutine[Any, Any, None]]) -> Answer:
        interrupted = False
        with Pace(self.request.number, "config", aside, more=self._so_far) as self._pace:
            started()  # the workers import while this process composes
            self._join(self.request.combinations())
            self._count()
            try:
                asyncio.run(self._begun(search))
            except KeyboardInterrupt:
                if not self._trials:
                    raise
                interrupted = True
        if not self._trials and self._refusals:
            raise self._refusals[0]
        return Answer(self.request, self.combinations, interrupted)

    async def _begun(self, search: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with workers() as self._pool:
            await self._decide()
            self.combinations = [each for each in self.combinations if self._is_allowed(each)]
            if not self.combinations:
                raise self._refusals[0]
            await search()

    async def _decide(self) -> None:
        """Let the first config that can be resolve what is `auto` for all."""
        for each in self.combinations:
            settings = self.request.settings(self.request.with_value(each.overrides, self.request.lowest))
            try:
                self.request.decide(*await in_worker(self._pool, decided, settings))
            except Refusal as refusal:
                self._refusals.append(refusal)
            else:
                return
        raise self._refusals[0]

    def _is_allowed(self, combination: Combination) -> bool:
        """Whether its settings are allowed with what was resolved."""
        try:
            self.request.settings(self.request.with_value(combination.overrides, self.request.lowest))
        except Refusal as refusal:
            self._refusals.append(refusal)
            return False
        return True

    @property
    def _trials(self) -> list[Trial]:
        return [trial for each in self.combinations for trial in each.trials]

    def _so_far(self) -> str:
        """What the bar says."""
        rehearsed = [trial for trial in self._trials if trial.rehearsed]
        return f"{len(rehearsed)} rehearsed, {sum(trial.fits for trial in rehearsed)} of them fit" * bool(
            rehearsed
        )

    def _join(self, overrides: Sequence[tuple[str, ...]]) -> list[Combination]:
        request = self.request
        added = [Combination(each, request.values, request.mode == "infer", self.room) for each in overrides]
        self.combinations += added
        return added

    async def _all(self) -> None:
        request = self.request
        await self._largest_of_each(self.combinations)
        if request.mode != "train" or "zero.offload" in request.typed:
            return
        for offload in OFFLOADED[1:]:
            if any(each.known for each in self._trials) and not any(each.fits for each in self._trials):
                more = self._join(request.combinations({"zero.offload": offload}))
                self._pace.more_to_come(len(more))
                await self._largest_of_each(more)

    async def _any(self) -> None:
        await asyncio.gather(*map(self._expect, self.combinations))
        value = self.request.lowest
        left = [each for each in self.combinations if not each.trials]
        expected = [(sum(categories.values()), each) for each in left if (categories := each.expected(value))]
        self.expected = min(expected, key=lambda pair: pair[0], default=None)
        if self.expected_to_fit:
            return
        unknown = [each for each in left if each.expected(value) is None]
        while unknown and not any(trial.fits for trial in self._trials):
            group, unknown = unknown[: self._at_once], unknown[self._at_once :]
            await asyncio.gather(*(self._rehearse(each, value) for each in group))

    async def _cheapest(self) -> None:
        await asyncio.gather(*map(self._expect, self.combinations))
        value = self.request.lowest
        left = [each for each in self.combinations if not each.trials]
        left = [each for each in left if sum((each.expected(value) or {}).values()) <= self.room]
        left.sort(key=lambda each: each.expected_cost)
        for number, each in enumerate(left):
            await self._climb(each)
            if each.largest is not None:
                self.not_tried = left[number + 1 :]
                return

    async def _rehearse(self, combination: Combination, value: int) -> None:
        settings = self.request.settings(self.request.with_value(combination.overrides, value))
        worst = await worst_of(self._pool, self.request.rehearsed(settings))
        self._add(combination, value, settings, worst)

    async def _largest_of_each(self, combinations: Sequence[Combination]) -> None:
        """Search the largest value of each combination; those first that are expected to be the cheapest."""
        await asyncio.gather(*map(self._expect, combinations))
        left = [each for each in combinations if not each.trials]
        left.sort(key=lambda each: each.expected_cost)
        if any(each.few for each in left):
            self._pace.say(self._first_answer(left[0]))
        chains: dict[tuple[str, ...], list[Combination]] = {}
        for each in left:
            chains.setdefault(self._without_recomputation(each), []).append(each)
        await asyncio.gather(*map(self._with_less_recomputation, chains.values()))

    async def _expect(self, combination: Combination) -> None:
        """Learn by shapes alone that nothing of `combination` fits, else by a few layers what is to be expected."""
        request, lowest = self.request, self.request.lowest
        settings = request.settings(request.with_value(combination.overrides, lowest))
        rehearsed = request.rehearsed(settings)
        surely = await in_worker(self._pool, bounds.by_shapes, rehearsed)
        if worst := combination.too_much(surely):
            self._add(combination, lowest, settings, worst)
        elif few := await in_worker(self._pool, bounds.by_few_layers, rehearsed):
            combination.few = few, lowest
            # here it is composed while the workers are busy
            combination.expected_cost = self._expected_cost(combination)

    def _expected_cost(self, combination: Combination) -> tuple[float, ...]:
        value = combination.climb.highest()
        if value is None:
            return NOT_EXPECTED
        try:
            return cost(self.request.settings(self.request.with_value(combination.overrides, value)))
        except Refusal:
            return NOT_EXPECTED

    def _first_answer(self, best: Combination) -> str:
        value = best.climb.highest()
        if value is None:
            return f"{FIRST}nothing fits"
        overrides = short([*best.overrides, f"{self.request.searched}={value}"])
        expected = sum((best.expected(value) or {}).values())
        return f"{FIRST}{' '.join(overrides)}, about {size(expected)} of {size(self.room)}"

    def _without_recomputation(self, combination: Combination) -> tuple[str, ...]:
        """The overrides without `checkpointing`, where the user leaves that open."""
        if "checkpointing" in self.request.typed:
            return combination.overrides
        return tuple(each for each in combination.overrides if not each.startswith(CHECKPOINTING))

    async def _with_less_recomputation(self, chain: Sequence[Combination]) -> None:
        """Search in combinations that differ in recomputation: more of it is needed only for values that less of it
        does not reach. Which that are is expected first; where that was wrong, the search goes on.
        """
        chain = sorted(chain, key=_recomputation)
        if all(each.few for each in chain):
            reached = 0
            for each in chain:
                each.climb.needless = reached
                reached = max(reached, each.climb.highest() or 0)
            await asyncio.gather(*map(self._climb, chain))
        reached = 0
        for each in chain:
            each.climb.needless = reached
            await self._climb(each)
            each.trials = [trial for trial in each.trials if not trial.fits or trial.value > reached]
            reached = max(reached, each.climb.fits)

    async def _climb(self, combination: Combination) -> None:
        """Rehearse until it is known which value is the largest that fits."""
        request = self.request
        while (value := combination.climb.wants()) is not None:
            try:
                settings = request.settings(request.with_value(combination.overrides, value))
            except Refusal as refusal:
                self._refusals.append(refusal)
                combination.climb.refuse(value)
                self._count()
                continue
            worst = combination.ruled_out(settings, value)
            if worst is None:
                worst = await worst_of(self._pool, request.rehearsed(settings))
            self._add(combination, value, settings, worst)

    def _add(self, combination: Combination, value: int, settings: Settings, worst: Worst) -> None:
        overrides = self.request.with_value(combination.overrides, value)
        combination.add(Trial(value, overrides, settings, worst, self.room - worst.needs))
        self._count()

    def _count(self) -> None:
        """Move the bar to the number of combinations that are done."""
        going_on = sum(each.climb.wants() is not None for each in self.combinations)
        self._pace.up_to((self._pace.total or 0) - going_on)


def _recomputation(combination: Combination) -> int:
    modes = [f"{CHECKPOINTING}{mode}" for mode in RECOMPUTED]
    return next((modes.index(each) for each in combination.overrides if each in modes), 0)
