"""What is known of the configs of a request, and the ways to learn more: by shapes, by a few layers, by rehearsals."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from harness.advice.fit.answer import Answer
from harness.advice.fit.combination import NOT_EXPECTED, Combination, Trial
from harness.advice.fit.ranking import cost
from harness.advice.fit.request import Request
from harness.config.settings import Refusal, Settings
from harness.rehearsal import bounds
from harness.rehearsal.moments import Moment
from harness.rehearsal.pool import Worst, cores, decided, in_worker, started, workers, worst_of
from harness.runtime.progress import Pace, aside

Search = Callable[["Trials"], Awaitable[None]]
"""What learns of trials what it wants to know."""

_COUNTED: dict[str, bounds.Counted | None] = {}
"""The models that were counted."""


class Known(NamedTuple):
    """What was learnt of configs, by their settings as text, and need not be again."""

    rehearsed: dict[str, Worst]
    by_few_layers: dict[str, tuple[Moment, ...]]


class Trials:
    """The combinations of `request`, of which a search learns more. Raises what the request raises.

    `known` has what was learnt before, and gets the rest.
    """

    def __init__(self, request: Request, known: Known | None = None) -> None:
        self.request, self.room = request, request.room
        self.combinations: list[Combination] = []
        self.at_once = cores()
        """How many rehearsals run at once."""
        self.times = 1.0
        """How many times what is expected a rehearsal is taken to come to."""
        self.came_to: list[float] = []
        """By combination: how many times what a few layers let expect the lowest value came to by a rehearsal."""
        self._known = Known({}, {}) if known is None else known
        self._refusals: list[Refusal] = []

    def answer(self, search: Search) -> Answer:
        """What is known after `search`, or where Ctrl-C ends it.

        Raises Refusal where every config is refused, and KeyboardInterrupt where nothing is known.
        """
        interrupted = False
        with Pace(self.request.number, "config", aside, more=self._so_far) as self._pace:
            started()  # the workers import while this process composes
            self._join(self.request.combinations())
            self._count()
            try:
                asyncio.run(self._begun(search))
            except KeyboardInterrupt:
                if not self.all:
                    raise
                interrupted = True
        if not self.all and self._refusals:
            raise self._refusals[0]
        return Answer(self.request, self.combinations, interrupted)

    async def _begun(self, search: Search) -> None:
        with workers() as self._pool:
            await self._decide()
            refusals = [*map(self._refusal, self.combinations)]
            allowed = zip(self.combinations, refusals, strict=True)
            self.combinations = [each for each, refusal in allowed if refusal is None]
            for refusal in refusals:
                if refusal is not None and not self.combinations:
                    raise refusal
            await search(self)

    async def _decide(self) -> None:
        """Let the first config that can be resolve what is `auto` for all."""
        refusals = []
        for each in self.combinations:
            try:
                self.request.decide(*await in_worker(self._pool, decided, self.lowest(each)))
            except Refusal as refusal:
                refusals.append(refusal)
            else:
                return
        raise refusals[0]

    def _refusal(self, combination: Combination) -> Refusal | None:
        """Why its settings are not allowed with what was resolved; None where they are."""
        try:
            self.lowest(combination)
        except Refusal as refusal:
            return refusal
        return None

    @property
    def all(self) -> list[Trial]:
        """Every trial."""
        return [trial for each in self.combinations for trial in each.trials]

    def _so_far(self) -> str:
        """What the bar says."""
        rehearsed = [trial for trial in self.all if trial.rehearsed]
        return f"{len(rehearsed)} rehearsed, {sum(trial.fits for trial in rehearsed)} of them fit" * bool(
            rehearsed
        )

    def say(self, line: str) -> None:
        """Say a line beside the bar."""
        self._pace.say(line)

    def more(self, overrides: Sequence[tuple[str, ...]]) -> list[Combination]:
        """Further combinations, of these overrides."""
        self._pace.more_to_come(len(overrides))
        return self._join(overrides)

    def _join(self, overrides: Sequence[tuple[str, ...]]) -> list[Combination]:
        request = self.request
        added = [Combination(each, request.values, request.mode == "infer", self.room) for each in overrides]
        self.combinations += added
        return added

    def may_fit(self, combination: Combination) -> bool:
        """Whether it is open if the lowest value of `combination` fits."""
        expected = combination.expected_bytes(self.request.lowest) or 0
        return not combination.trials and not combination.hopeless and expected * self.times <= self.room

    async def not_ruled_out(self, combinations: Sequence[Combination]) -> list[Combination]:
        """Learn by shapes alone of which combinations nothing fits, and return the others."""
        lowest = [self.request.rehearsed(self.lowest(each)) for each in combinations]
        models = [*map(bounds.model_of, lowest)]
        new = {model: each for model, each in zip(models, lowest, strict=True) if model not in _COUNTED}
        counts = [in_worker(self._pool, bounds.count, settings) for settings in new.values()]
        _COUNTED.update(zip(new, await asyncio.gather(*counts), strict=True))
        for each, settings, model in zip(combinations, lowest, models, strict=True):
            surely = bounds.by_shapes(settings, _COUNTED[model])
            if worst := each.too_much(surely):
                self._learn(each, self.request.lowest, settings, worst)
        self._count()
        return [each for each in combinations if not each.trials]

    async def estimate(self, combinations: Sequence[Combination]) -> None:
        """Learn by a few layers what is to be expected."""

        async def one(combination: Combination) -> None:
            settings = self.request.rehearsed(self.lowest(combination))
            key = repr(settings)
            if key not in self._known.by_few_layers:
                few = await in_worker(self._pool, bounds.by_few_layers, settings)
                self._known.by_few_layers[key] = few
            if few := self._known.by_few_layers[key]:
                combination.few = few, self.request.lowest
                # here it is composed while the workers are busy
                combination.expected_cost = self._expected_cost(combination)

        await asyncio.gather(*(one(each) for each in combinations if not each.few))

    def lowest(self, combination: Combination) -> Settings:
        """The settings of `combination` with the lowest value."""
        return self.request.settings(self.request.with_value(combination.overrides, self.request.lowest))

    def _expected_cost(self, combination: Combination) -> tuple[float, ...]:
        value = combination.climb.highest()
        if value is None:
            return NOT_EXPECTED
        try:
            return cost(self.request.settings(self.request.with_value(combination.overrides, value)))
        except Refusal:
            return NOT_EXPECTED

    async def rehearse(self, combination: Combination, value: int) -> None:
        """Rehearse `combination` with `value`. Raises Refusal."""
        settings = self.request.settings(self.request.with_value(combination.overrides, value))
        self._add(combination, value, settings, await self._worst(settings))

    async def climb(self, combination: Combination) -> None:
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
                worst = await self._worst(settings)
            self._add(combination, value, settings, worst)

    async def _worst(self, settings: Settings) -> Worst:
        rehearsed = self.request.rehearsed(settings)
        key = repr(rehearsed)
        if key not in self._known.rehearsed:
            self._known.rehearsed[key] = await worst_of(self._pool, rehearsed)
        return self._known.rehearsed[key]

    def _add(self, combination: Combination, value: int, settings: Settings, worst: Worst) -> None:
        self._learn(combination, value, settings, worst)
        self._count()

    def _learn(self, combination: Combination, value: int, settings: Settings, worst: Worst) -> None:
        overrides = self.request.with_value(combination.overrides, value)
        if combination.few and not combination.trials and not worst.bound and value == self.request.lowest:
            self.came_to.append(worst.needs / (combination.expected_bytes(value) or 1))
        combination.add(Trial(value, overrides, settings, worst, self.room - worst.needs))

    def _count(self) -> None:
        """Move the bar to the number of combinations that are done."""
        going_on = sum(each.climb.wants() is not None for each in self.combinations)
        self._pace.up_to((self._pace.total or 0) - going_on)
