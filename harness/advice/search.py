"""The search of `harness fit`: it rehearses configs along axes, and raises the last axis until it does not fit."""

from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from harness.advice.climb import Climb
from harness.config import compose
from harness.config.deepspeed_file import expanded
from harness.config.load import load
from harness.config.rules import check_world
from harness.config.settings import NEW_TOKENS, RESOLVED, Refusal, Settings
from harness.device.outside import budget
from harness.rehearsal import decisive
from harness.rehearsal.pool import Worst, at_least, decided, progress, rehearse_all, workers
from harness.tables import size

AXES = {
    "train": {
        "zero": "0,1,2,3",
        "zero.offload": "none",
        "pipeline.stages": "1",
        "checkpointing": "none,selective,full",
        "train.micro_batch": "",
    },
    "infer": {"generation.prompt_length": "64", "generation.max_new_tokens": "64", "generation.batch": ""},
}
"""Keys that take a list, with their defaults. The last key is climbed: a larger value needs more bytes."""

RECOMPUTED = ("none", "selective", "full")
"""The modes of checkpointing: each recomputes more than the one before, and keeps less."""

LAST_RESORT = ("optimizer", "all")
"""The values of zero.offload that are tried if nothing else fits and the user has not set it."""


class Trial(NamedTuple):
    """A rehearsed config with its overrides; `left` is the free memory in bytes, negative if it does not fit.

    A GPU's allocator that runs out of memory empties its cache and tries again, so there only the rehearsal within that
    memory decides.
    """

    overrides: tuple[str, ...]
    settings: Settings
    worst: Worst
    left: int

    @property
    def fits(self) -> bool:
        """Whether the config fits into the memory."""
        return self.known and not self.worst.bound and self.left >= 0 and not self.worst.exhausted

    @property
    def fragmented(self) -> bool:
        """Whether only what is reserved does not fit, and what is allocated would."""
        allocated = self.worst.allocated
        return self.worst.exhausted and allocated is not None and allocated <= self.left + self.worst.needs

    @property
    def known(self) -> bool:
        """Whether it is known if the config fits: by a rehearsal, or because what a rank surely has does not."""
        return not self.worst.failure

    @property
    def rehearsed(self) -> bool:
        """Whether a rehearsal succeeded."""
        return self.known and not self.worst.bound


class Fit:
    """The request: configs along axes, and the memory that they must fit into. Raises Refusal and ValueError."""

    def __init__(self, overrides: Sequence[str], reserve: int = 0) -> None:
        overrides = expanded(overrides).arguments
        typed = dict(override.partition("=")[::2] for override in overrides)
        for override in overrides:
            if "=" not in override:
                raise ValueError(
                    f"fit: {override}: neither key=value nor an option; --help lists what there is"
                )
        self.mode = typed.get("mode", "train")
        if self.mode not in AXES:
            raise Refusal("mode", self.mode, "no such mode; one of train, infer")
        if self.mode == "infer" and {"generation.prompts", "generation.prompt", "generation.workload"} & set(
            typed
        ):
            raise Refusal("generation.prompts", "...", "fit needs lengths; give generation.prompt_length=")
        self.axes = {key: typed.get(key, values) for key, values in AXES[self.mode].items()}
        self.typed, self.reserve = typed, reserve
        managed = {*self.axes, "world", "world.size", "ledger", "ledger.steps", "generation.count"}
        self.overrides = [override for override in overrides if override.partition("=")[0] not in managed]
        world_size = typed.get("world.size", "")
        self.world = int(world_size) if world_size.isdecimal() else 1
        self.decided: list[str] = []
        self.so_far: list[Trial] = []
        """What is known already, while a search goes on."""
        self.interrupted = False
        self.reasons: dict[str, str] = {}
        """The reasons for the resolved values of keys at `auto`; empty until a search begins."""
        self.climbs = self._climbs({}, typed)
        formed = budget(self._first().hardware, self.world)
        if formed is None:
            remedy = "fit must know the memory of a device; give hardware=NAME or hardware.memory=BYTES"
            raise Refusal("hardware.memory", None, remedy)
        if formed.bytes <= reserve:
            kept = f"--reserve keeps {size(reserve)}"
            raise ValueError(f"fit: nothing is left for a config: {formed.sentence()}; {kept}")
        self.budget, self.memory = formed, formed.bytes

    def _first(self) -> Settings:
        """The settings of the first climb's lowest value."""
        climb = self.climbs[0]
        lowest = climb.wants() or 1
        return self.settings(
            [*climb.overrides, f"{climb.key}={lowest}", *self._accumulation(climb.overrides, lowest)]
        )

    def settings(self, chosen: Sequence[str]) -> Settings:
        """The settings that rehearse a config with the overrides `chosen`, one for each axis. Raises Refusal."""
        world_overrides = [f"world.size={self.typed['world.size']}"] if "world.size" in self.typed else []
        values = dict(override.partition("=")[::2] for override in chosen)
        if self.mode == "infer" and world_overrides:
            with suppress(ValueError):  # the check of the settings words it better
                count = int(values["generation.batch"]) * int(self.typed["world.size"])
                world_overrides.append(f"generation.count={count}")
        all_overrides = [
            *self.overrides,
            *self.decided,
            *chosen,
            "world=rehearsed",
            "ledger=exact",
            "ledger.steps=2",
            *world_overrides,
        ]
        try:
            settings = load(compose.compose(all_overrides))
        except Refusal as refusal:
            if refusal.remedy != compose.SWEEP:
                raise
            lists = ", ".join(self.axes)
            raise Refusal(
                refusal.key, refusal.value, f"give one value; lists may be given for {lists}"
            ) from None
        check_world(settings, settings.world.size or 1)
        return settings

    def search(self) -> list[Trial]:
        """Rehearse the configs that must be, and return them all; those that are known already where Ctrl-C ends it.

        Raises Refusal where every config is refused.
        """
        try:
            return self._search()
        except KeyboardInterrupt:
            if not self.so_far:
                raise
            self.interrupted = True
            return self.so_far

    def _search(self) -> list[Trial]:
        self._decide()
        with progress(None) as self.pace:
            trials = self._least_first(self.climbs)
            if self.mode == "train" and "zero.offload" not in self.typed:
                for offload in LAST_RESORT:
                    if any(trial.known for trial in trials) and not any(trial.fits for trial in trials):
                        trials += self._least_first(self._climbs({"zero.offload": offload}, ()))
        return trials

    def _decide(self) -> None:
        """Resolve the keys at `auto` once for all configs: no axis changes the result."""
        with workers() as pool:
            settings, self.reasons = decided(pool, self._first())
        values = settings.precision, settings.model.attention
        self.decided = [f"{key}={value}" for key, value in zip(RESOLVED, values, strict=True)]

    def _least_first(self, climbs: Sequence[Climb]) -> list[Trial]:
        """Run every climb. Without a `checkpointing` from the user, less recomputation goes first.

        A climb with more recomputation begins at the value that the climb with less of it has reached.
        """
        if self.mode == "infer" or "checkpointing" in self.typed:
            return self._climb(climbs)
        trials: list[Trial] = []
        reached: dict[tuple[str, ...], int] = {}
        for mode_override in [f"checkpointing={mode}" for mode in RECOMPUTED]:
            same_mode = [climb for climb in climbs if mode_override in climb.overrides]
            for climb in same_mode:
                climb.fits = reached.get(_without(climb.overrides, mode_override), 0)
            try:
                trials += self._climb(same_mode)
            except Refusal:  # nothing is possible above what less recomputation has reached
                if not trials:
                    raise
            reached |= {_without(climb.overrides, mode_override): climb.fits for climb in same_mode}
        return trials

    def _climbs(self, changed: dict[str, str], requested: Container[str]) -> list[Climb]:
        """One climb of the last axis for each combination of the other axes that the settings do not refuse.

        Raises Refusal where no combination allows a value of an axis in `requested`, or where none is possible at all.
        """
        *fixed, climbed = self.axes
        choices = [
            [f"{key}={value}" for value in changed.get(key, self.axes[key]).split(",")] for key in fixed
        ]
        values = [value for value in self.axes[climbed].split(",") if value]
        rungs = sorted({_positive_integer(climbed, value) for value in values})
        possible: list[Climb] = []
        refused: dict[str, Refusal] = {}
        for overrides in product(*choices):
            try:
                lowest = (rungs or [1])[0]
                self.settings([*overrides, f"{climbed}={lowest}", *self._accumulation(overrides, lowest)])
                possible.append(Climb(overrides, climbed, rungs))
            except Refusal as refusal:
                for override in overrides:
                    refused.setdefault(override, refusal)
        for override, reason in refused.items():
            nowhere = not any(override in climb.overrides for climb in possible)
            if nowhere and override.partition("=")[0] in requested:
                raise reason
        if not changed and not possible:
            raise next(iter(refused.values()))
        return possible

    def _climb(self, climbs: Sequence[Climb]) -> list[Trial]:
        """Run all climbs in parallel, one rung of each at a time."""
        trials: list[Trial] = []
        refusals: list[Refusal] = []
        with workers() as pool:
            while True:
                wanted = list(self._rungs(climbs, refusals))
                if not wanted:
                    break
                rehearsed = [self._without_reserve(decisive(settings)) for _, _, settings in wanted]
                results = self._results(pool, rehearsed)
                for (climb, overrides, settings), worst in zip(wanted, results, strict=True):
                    trial = Trial(overrides, settings, worst, self.memory - self.reserve - worst.needs)
                    if trial.known:
                        climb.learn(trial.fits, exactly=self.mode == "infer")
                    else:
                        climb.refused()
                    trials.append(trial)
                    self.so_far.append(trial)
        if not trials and refusals:
            raise refusals[0]
        return trials

    def _results(self, pool: ProcessPoolExecutor, wanted: Sequence[Settings]) -> list[Worst]:
        """The worst rank under each of `wanted`. What shapes alone rule out is not rehearsed."""
        budget = self.memory - self.reserve
        bounds = list(pool.map(at_least, wanted))
        possible = [settings for settings, bound in zip(wanted, bounds, strict=True) if bound <= budget]
        rehearsed = iter(rehearse_all(pool, possible, self.pace))
        return [
            next(rehearsed) if bound <= budget else Worst(bound, 0, {"parameters": bound}, bound=True)
            for bound in bounds
        ]

    def _without_reserve(self, settings: Settings) -> Settings:
        """`settings` for a card that has less memory, by what is kept free."""
        key = {"torch": "memory_torch", "driver": "memory_driver", "hardware.memory": "memory"}[
            self.budget.source
        ]
        less: dict[str, Any] = {key: self.budget.total - self.reserve}
        return replace(settings, hardware=replace(settings.hardware, **less))

    def _rungs(
        self, climbs: Sequence[Climb], refusals: list[Refusal]
    ) -> Iterator[tuple[Climb, tuple[str, ...], Settings]]:
        """The next config of each climb. A climb whose config is refused is over."""
        for climb in climbs:
            while (rung := climb.wants()) is not None:
                try:
                    overrides = (
                        *climb.overrides,
                        f"{climb.key}={rung}",
                        *self._accumulation(climb.overrides, rung),
                    )
                    yield climb, overrides, self.settings(overrides)
                    break
                except Refusal as refusal:
                    refusals.append(refusal)
                    climb.refused()

    def _accumulation(self, overrides: Sequence[str], micro_batch: int) -> Iterator[str]:
        """The accumulation that reaches the user's `train.batch`, if one is set. Raises Refusal where none does."""
        if self.mode == "train" and "train.batch" in self.typed and "train.accumulation" not in self.typed:
            stages = dict(override.partition("=")[::2] for override in overrides)["pipeline.stages"]
            dp_size = max(1, self.world // _positive_integer("pipeline.stages", stages))
            batch, sequences = (
                _positive_integer("train.batch", self.typed["train.batch"]),
                micro_batch * dp_size,
            )
            if batch % sequences:
                raise Refusal(
                    "train.batch", batch, f"no multiple of train.micro_batch={micro_batch} on {dp_size}"
                )
            yield f"train.accumulation={batch // sequences}"

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """The largest config that fits of each combination, the cheapest first."""
        largest: dict[tuple[str, ...], Trial] = {}
        for trial in trials:
            key = tuple(
                override for override in trial.overrides if override.partition("=")[0] in [*self.axes][:-1]
            )
            if trial.fits and (key not in largest or self._rung(trial) > self._rung(largest[key])):
                largest[key] = trial
        return sorted(largest.values(), key=lambda trial: cost(trial.settings))

    def _rung(self, trial: Trial) -> int:
        return trial.settings.train.micro_batch if self.mode == "train" else trial.settings.generation.batch


def cost(settings: Settings) -> tuple[float, ...]:
    """The sort key of a config, the cheapest first.

    In inference it is the number of tokens in memory at once, the most first. In training it is, in this order:
    the offload to the host, the recomputation, the share of a step that stages wait for each other, the elements that
    a rank sends, and ZeRO's stage. The elements are per parameter of the rank's stage and per sequence: 2 a step under
    ZeRO-0 and 1, 1 a step and 1 a micro-batch under ZeRO-2, 3 a micro-batch under ZeRO-3 (Rajbhandari et al. 2020,
    arXiv 1910.02054, section 7).
    """
    if settings.mode == "infer":
        generation = settings.generation
        new = generation.max_new_tokens or NEW_TOKENS
        return (-(generation.prompt_length + new) * generation.batch,)
    zero, train = settings.zero, settings.train
    sent = {0: 2.0, 1: 2.0, 2: 1.0 + train.accumulation, 3: 3.0 * train.accumulation}[zero.stage]
    offload = ("none", *LAST_RESORT).index(zero.offload)
    recompute = RECOMPUTED.index(settings.checkpointing.mode)
    stages = settings.pipeline.stages
    waits = (stages - 1) / (train.accumulation + stages - 1)
    return offload, recompute, waits, sent / (train.micro_batch * train.accumulation * stages), zero.stage


def _without(overrides: tuple[str, ...], override: str) -> tuple[str, ...]:
    return tuple(each for each in overrides if each != override)


def _positive_integer(key: str, value: str) -> int:
    if not value.isascii() or not value.isdecimal() or int(value) < 1:
        raise Refusal(key, value, "should be whole numbers of 1 or more, as 1,2,4")
    return int(value)
