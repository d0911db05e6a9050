"""The search of `harness fit`: configs along axes, each climbed until it does not fit, every verdict a rehearsal's."""

from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import NamedTuple

from harness.advice.climb import Climb
from harness.config import compose
from harness.config.load import load
from harness.config.rules import check_world
from harness.config.settings import NEW_TOKENS, RESOLVED, Refusal, Settings
from harness.rehearsal import decisive
from harness.rehearsal.pool import Worst, decided, progress, rehearse_all, workers

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
"""Keys that take a list, with what is tried when nothing is said. The last one is climbed: more of it is more bytes."""

RECOMPUTED = ("none", "selective", "full")
"""What checkpointing may be, each computing more again than the one before, and keeping less."""

LAST_RESORT = ("optimizer", "all")
"""What zero.offload may be where nothing else fits, and nobody said what it should be."""


class Trial(NamedTuple):
    """A config that was rehearsed, as the words that make it; `left` of the memory, below 0 where it does not fit."""

    words: tuple[str, ...]
    settings: Settings
    worst: Worst
    left: int

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.rehearsed and self.left >= 0

    @property
    def rehearsed(self) -> bool:
        """Whether there is an answer."""
        return not self.worst.failure


class Fit:
    """What was asked for: configs along axes, and the memory they must fit into. Raises Refusal."""

    def __init__(self, words: Sequence[str], reserve: int = 0) -> None:
        given = dict(word.partition("=")[::2] for word in words)
        for word in words:
            if "=" not in word:
                raise ValueError(f"fit: {word}: neither key=value nor an option; --help says what there is")
        self.mode = given.get("mode", "train")
        if self.mode not in AXES:
            raise Refusal("mode", self.mode, "no such mode; one of train, infer")
        if self.mode == "infer" and {"generation.prompts", "generation.prompt", "generation.workload"} & set(
            given
        ):
            raise Refusal("generation.prompts", "...", "fit asks for lengths; give generation.prompt_length=")
        self.axes = {key: given.get(key, values) for key, values in AXES[self.mode].items()}
        self.given, self.reserve = given, reserve
        ours = {*self.axes, "world", "world.size", "ledger", "ledger.steps", "generation.count"}
        self.words = [word for word in words if word.partition("=")[0] not in ours]
        size_given = given.get("world.size", "")
        self.world = int(size_given) if size_given.isdecimal() else 1
        self.decided: list[str] = []
        self.reasons: dict[str, str] = {}
        """What is `auto` among the words, and came to what, once a search has begun."""
        self.climbs = self._climbs({}, given)
        memory = self._first().hardware.memory
        if memory is None:
            remedy = "fit must know what a device has; give hardware=NAME or hardware.memory=BYTES"
            raise Refusal("hardware.memory", None, remedy)
        self.memory = memory

    def _first(self) -> Settings:
        """The least of the first climb."""
        climb = self.climbs[0]
        lowest = climb.wants() or 1
        return self.settings(
            [*climb.words, f"{climb.key}={lowest}", *self._accumulation(climb.words, lowest)]
        )

    def settings(self, chosen: Sequence[str]) -> Settings:
        """The rehearsal of a config with `chosen`, a word for each axis. Raises Refusal."""
        around = [f"world.size={self.given['world.size']}"] if "world.size" in self.given else []
        values = dict(word.partition("=")[::2] for word in chosen)
        if self.mode == "infer" and around:
            with suppress(ValueError):  # the settings say it better
                count = int(values["generation.batch"]) * int(self.given["world.size"])
                around.append(f"generation.count={count}")
        every = [
            *self.words,
            *self.decided,
            *chosen,
            "world=rehearsed",
            "ledger=exact",
            "ledger.steps=2",
            *around,
        ]
        try:
            settings = load(compose.compose(every))
        except Refusal as refusal:
            if not refusal.remedy.startswith("sweeps"):
                raise
            lists = ", ".join(self.axes)
            raise Refusal(
                refusal.key, refusal.value, f"give one value; lists may be given for {lists}"
            ) from None
        check_world(settings, settings.world.size or 1)
        return settings

    def search(self) -> list[Trial]:
        """Every config that had to be rehearsed. Raises Refusal where all that was asked for is refused."""
        self._decide()
        with progress(None) as self.pace:
            trials = self._least_first(self.climbs)
            if self.mode == "train" and "zero.offload" not in self.given:
                for offload in LAST_RESORT:
                    if any(trial.rehearsed for trial in trials) and not any(trial.fits for trial in trials):
                        trials += self._least_first(self._climbs({"zero.offload": offload}, ()))
        return trials

    def _decide(self) -> None:
        """Decide what is `auto`, once for all of them: no axis changes it."""
        with workers(1) as pool:
            settings, self.reasons = decided(pool, self._first())
        values = settings.precision, settings.model.attention
        self.decided = [f"{key}={value}" for key, value in zip(RESOLVED, values, strict=True)]

    def _least_first(self, climbs: Sequence[Climb]) -> list[Trial]:
        """Every climb; where nobody said what to recompute, one that recomputes more begins where less has ended."""
        if self.mode == "infer" or "checkpointing" in self.given:
            return self._climb(climbs)
        trials: list[Trial] = []
        reached: dict[tuple[str, ...], int] = {}
        for word in [f"checkpointing={mode}" for mode in RECOMPUTED]:
            these = [climb for climb in climbs if word in climb.words]
            for climb in these:
                climb.fits = reached.get(_without(climb.words, word), 0)
            try:
                trials += self._climb(these)
            except Refusal:  # nothing above what less recomputation has reached
                if not trials:
                    raise
            reached |= {_without(climb.words, word): climb.fits for climb in these}
        return trials

    def _climbs(self, changed: dict[str, str], asked: Container[str]) -> list[Climb]:
        """One for each combination of the axes but the last, which it climbs, that the settings do not refuse.

        Raises Refusal where a value of an axis that is `asked` for can be in none, or nothing is possible at all.
        """
        *fixed, climbed = self.axes
        choices = [
            [f"{key}={value}" for value in changed.get(key, self.axes[key]).split(",")] for key in fixed
        ]
        values = [value for value in self.axes[climbed].split(",") if value]
        rungs = sorted({_whole(climbed, value) for value in values})
        possible: list[Climb] = []
        refused: dict[str, Refusal] = {}
        for words in product(*choices):
            try:
                lowest = (rungs or [1])[0]
                self.settings([*words, f"{climbed}={lowest}", *self._accumulation(words, lowest)])
                possible.append(Climb(words, climbed, rungs))
            except Refusal as refusal:
                for word in words:
                    refused.setdefault(word, refusal)
        for word, reason in refused.items():
            nowhere = not any(word in climb.words for climb in possible)
            if nowhere and word.partition("=")[0] in asked:
                raise reason
        if not changed and not possible:
            raise next(iter(refused.values()))
        return possible

    def _climb(self, climbs: Sequence[Climb]) -> list[Trial]:
        """Every climb a rung at a time, all of them at once."""
        trials: list[Trial] = []
        refusals: list[Refusal] = []
        with workers(len(climbs)) as pool:
            while True:
                asked = list(self._rungs(climbs, refusals))
                if not asked:
                    break
                found = rehearse_all(pool, [decisive(settings) for _, _, settings in asked], self.pace)
                for (climb, words, settings), worst in zip(asked, found, strict=True):
                    trial = Trial(words, settings, worst, self.memory - self.reserve - worst.bytes)
                    if trial.rehearsed:
                        climb.learn(trial.fits, exactly=self.mode == "infer")
                    else:
                        climb.refused()
                    trials.append(trial)
        if not trials and refusals:
            raise refusals[0]
        return trials

    def _rungs(
        self, climbs: Sequence[Climb], refusals: list[Refusal]
    ) -> Iterator[tuple[Climb, tuple[str, ...], Settings]]:
        """What each climb wants to know next; one whose config is refused is over."""
        for climb in climbs:
            while (rung := climb.wants()) is not None:
                try:
                    words = (*climb.words, f"{climb.key}={rung}", *self._accumulation(climb.words, rung))
                    yield climb, words, self.settings(words)
                    break
                except Refusal as refusal:
                    refusals.append(refusal)
                    climb.refused()

    def _accumulation(self, words: Sequence[str], micro_batch: int) -> Iterator[str]:
        """What makes `train.batch` of it, where one is given. Raises Refusal where nothing does."""
        if self.mode == "train" and "train.batch" in self.given and "train.accumulation" not in self.given:
            stages = dict(word.partition("=")[::2] for word in words)["pipeline.stages"]
            replicas = max(1, self.world // _whole("pipeline.stages", stages))
            batch, together = _whole("train.batch", self.given["train.batch"]), micro_batch * replicas
            if batch % together:
                raise Refusal(
                    "train.batch", batch, f"no multiple of train.micro_batch={micro_batch} on {replicas}"
                )
            yield f"train.accumulation={batch // together}"

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """Of each combination the largest that fits, cheapest first."""
        largest: dict[tuple[str, ...], Trial] = {}
        for trial in trials:
            key = tuple(word for word in trial.words if word.partition("=")[0] in [*self.axes][:-1])
            if trial.fits and (key not in largest or self._rung(trial) > self._rung(largest[key])):
                largest[key] = trial
        return sorted(largest.values(), key=lambda trial: cost(trial.settings))

    def _rung(self, trial: Trial) -> int:
        return trial.settings.train.micro_batch if self.mode == "train" else trial.settings.generation.batch


def cost(settings: Settings) -> tuple[float, ...]:
    """What a config is ranked by, the cheapest first.

    In training the elements that a rank sends for each parameter and sequence: 2 a step under ZeRO-0 and 1, 1 a step
    and 1 a micro-batch under ZeRO-2, 3 a micro-batch under ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054,
    section 7), of the parameters that its stage of a pipeline has. Before it whether the host's link is used, what is
    computed twice, and the part of a step that stages wait for each other; after it ZeRO's stage.
    """
    if settings.mode == "infer":
        generation = settings.generation
        new = generation.max_new_tokens or NEW_TOKENS
        return (-(generation.prompt_length + new) * generation.batch,)
    zero, train = settings.zero, settings.train
    step = {0: 2.0, 1: 2.0, 2: 1.0 + train.accumulation, 3: 3.0 * train.accumulation}[zero.stage]
    offload = ("none", *LAST_RESORT).index(zero.offload)
    recompute = RECOMPUTED.index(settings.checkpointing.mode)
    stages = settings.pipeline.stages
    waits = (stages - 1) / (train.accumulation + stages - 1)
    return offload, recompute, waits, step / (train.micro_batch * train.accumulation * stages), zero.stage


def _without(words: tuple[str, ...], word: str) -> tuple[str, ...]:
    return tuple(each for each in words if each != word)


def _whole(key: str, value: str) -> int:
    if not value.isascii() or not value.isdecimal() or int(value) < 1:
        raise Refusal(key, value, "should be whole numbers of 1 or more, as 1,2,4")
    return int(value)
