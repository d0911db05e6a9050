"""`harness fit`: which of the sensible configs fit into a device's memory, each rehearsed, and which costs least."""

import argparse
import json
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import NamedTuple, NoReturn

from harness import config
from harness.knobs import Refusal, Settings
from harness.rehearsal.pool import Worst, progress, rehearse_all, workers
from harness.search import Climb
from harness.settings import check_world, load
from harness.tables import UNITS, Table, size

AXES = {
    "train": {"zero": "0,1,2,3", "zero.offload": "none", "checkpointing": "none", "train.micro_batch": ""},
    "infer": {"generation.prompt_length": "64", "generation.max_new_tokens": "64", "generation.batch": ""},
}
"""Keys that take a list, with what is tried when nothing is said. The last one is climbed: more of it is more bytes."""

LAST_RESORT = ("optimizer", "all")
"""What zero.offload may be where nothing else fits, and nobody said what it should be."""

LISTED = 6
"""How many of those that do not fit are shown, the closest first."""

NODE = 8
"""Devices of a node, in the command for more than one."""

RANKING = {
    "train": "ranked by what a rank sends for each sequence (arXiv 1910.02054, section 7); offload last",
    "infer": "ranked by the tokens that are held at once, batch x (prompt + new)",
}
UNSEEN = (
    "scratch inside kernels and what lies outside the framework (CUDA context, NCCL) is not in these figures"
)


class Trial(NamedTuple):
    """A config that was rehearsed, as the words that make it; `left` of the memory, below 0 where it does not fit."""

    words: tuple[str, ...]
    settings: Settings
    worst: Worst
    left: int

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return not self.worst.failure and self.left >= 0


def main(argv: Sequence[str]) -> int:
    """`harness fit`; the exit code: 0 something fits, 1 nothing does, 2 a wrong request."""
    try:
        asked, words = _parser().parse_known_args(argv)
        fit = Fit(words, parse_size(asked.reserve))
    except ValueError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    trials = fit.search()
    print(json.dumps(fit.data(trials), indent=1) if asked.json else fit.text(trials))
    return 0 if any(trial.fits for trial in trials) else 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"fit: {message}; --help says what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "harness fit",
        description="Rehearse the configs that could run on a device, and rank those that fit.",
        usage="harness fit mode=train|infer world.size=N hardware=NAME [key=value[,value...] ...]",
        epilog="Lists may be given for " + ", ".join(key for axes in AXES.values() for key in axes) + ".",
        allow_abbrev=False,
    )
    parser.add_argument("--reserve", default="0", metavar="SIZE", help="memory to keep free, as 2GiB")
    parser.add_argument("--json", action="store_true", help="every rehearsal, as data")
    return parser


def parse_size(text: str) -> int:
    """Bytes of a text as `2GiB` or `500`. Raises ValueError."""
    for power, unit in sorted(enumerate(UNITS), reverse=True):
        if text.endswith(unit):
            text, factor = text.removesuffix(unit).strip(), 1024**power
            break
    else:
        factor = 1
    with suppress(ValueError):
        if (count := float(text)) >= 0:
            return int(count * factor)
    raise ValueError(
        f"--reserve={text}: not a size; give bytes, or a number with one of {', '.join(UNITS[1:])}"
    )


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
        if self.mode == "infer" and {"generation.prompts", "generation.prompt"} & set(given):
            raise Refusal("generation.prompts", "...", "fit asks for lengths; give generation.prompt_length=")
        self.axes = {key: given.get(key, values) for key, values in AXES[self.mode].items()}
        self.given, self.reserve = given, reserve
        ours = {*self.axes, "world", "world.size", "ledger", "ledger.steps", "generation.count"}
        self.words = [word for word in words if word.partition("=")[0] not in ours]
        self.climbs = self._climbs({}, self.axes)
        first = self.settings([*self.climbs[0].words, f"{self.climbs[0].key}={self.climbs[0].wants()}"])
        self.world = first.world.size or 1
        if first.hardware.memory is None:
            remedy = "fit must know what a device has; give hardware=NAME or hardware.memory=BYTES"
            raise Refusal("hardware.memory", None, remedy)
        self.memory = first.hardware.memory

    def settings(self, chosen: Sequence[str]) -> Settings:
        """The rehearsal of a config with `chosen`, a word for each axis. Raises Refusal."""
        around = [f"world.size={self.given['world.size']}"] if "world.size" in self.given else []
        values = dict(word.partition("=")[::2] for word in chosen)
        if self.mode == "infer" and around:
            with suppress(ValueError):  # the settings say it better
                count = int(values["generation.batch"]) * int(self.given["world.size"])
                around.append(f"generation.count={count}")
        every = [*self.words, *chosen, "world=rehearsed", "ledger=exact", "ledger.steps=2", *around]
        try:
            settings = load(config.compose(every))
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
        trials = self._climb(self.climbs)
        if self.mode == "train" and "zero.offload" not in self.given:
            for offload in LAST_RESORT:
                if not any(trial.fits for trial in trials):
                    trials += self._climb(self._climbs({"zero.offload": offload}, ()))
        return trials

    def _climbs(self, changed: dict[str, str], asked: Container[str]) -> list[Climb]:
        """One for each combination of the axes but the last, which it climbs, that the settings do not refuse.

        Raises Refusal where a value of an axis that is `asked` for can be in none.
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
                self.settings([*words, f"{climbed}={(rungs or [1])[0]}"])
                possible.append(Climb(words, climbed, rungs))
            except Refusal as refusal:
                for word in words:
                    refused.setdefault(word, refusal)
        for word, reason in refused.items():
            nowhere = not any(word in climb.words for climb in possible)
            if nowhere and word.partition("=")[0] in asked:
                raise reason
        return possible

    def _climb(self, climbs: Sequence[Climb]) -> list[Trial]:
        """Every climb a rung at a time, all of them at once."""
        trials: list[Trial] = []
        refusals: list[Refusal] = []
        with workers(len(climbs)) as pool, progress(None) as bar:
            while True:
                asked = list(self._rungs(climbs, refusals))
                if not asked:
                    break
                found = rehearse_all(pool, [settings for _, _, settings in asked], bar)
                for (climb, words, settings), worst in zip(asked, found, strict=True):
                    trial = Trial(words, settings, worst, self.memory - self.reserve - worst.bytes)
                    climb.told(trial.fits, exactly=self.mode == "infer")
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
                    words = (*climb.words, f"{climb.key}={rung}", *self._accumulation(rung))
                    yield climb, words, self.settings(words)
                    break
                except Refusal as refusal:
                    refusals.append(refusal)
                    climb.refused()

    def _accumulation(self, micro_batch: int) -> Iterator[str]:
        """What makes `train.batch` of it, where one is given. Raises Refusal where nothing does."""
        if self.mode == "train" and "train.batch" in self.given and "train.accumulation" not in self.given:
            batch, together = _whole("train.batch", self.given["train.batch"]), micro_batch * self.world
            if batch % together:
                raise Refusal(
                    "train.batch", batch, f"no multiple of train.micro_batch={micro_batch} on {self.world}"
                )
            yield f"train.accumulation={batch // together}"

    # -- what is said ------------------------------------------------------------------------------------------

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

    def text(self, trials: Sequence[Trial]) -> str:
        """A table for a person; its last line is the command to run."""
        fitting = self.ranked(trials)
        closest = sorted((t for t in trials if not t.fits and not t.worst.failure), key=lambda t: -t.left)
        table = Table(["peak"], ["left"], ["of it"], ["filled by"])
        if fitting:
            table.section(
                f"fits {size(self.memory - self.reserve)} a device, the worst of {self.world} ranks"
            )
        for trial in fitting:
            table.row(*self._row(trial))
        if closest:
            table.section("does not fit")
        for trial in closest[:LISTED]:
            table.row(*self._row(trial))
        failed = [f"not rehearsed: {' '.join(t.words)}: {t.worst.failure}" for t in trials if t.worst.failure]
        lines = [table.text(), "", RANKING[self.mode], UNSEEN, *failed]
        lines.append(f"{len(trials)} configs rehearsed; what needs more than one that does not fit was not")
        if fitting:
            return "\n".join([*lines, "", self.command(fitting[0])])
        short = (
            f"nothing fits; {' '.join(closest[0].words)} misses by {size(-closest[0].left)}"
            if closest
            else "nothing fits"
        )
        return "\n".join([*lines, "", short])

    def _row(self, trial: Trial) -> list[str]:
        worst, room = trial.worst, self.memory - self.reserve
        held = sorted(worst.categories.items(), key=lambda pair: -pair[1])[:2]
        filled = ", ".join(f"{name} {size(count)}" for name, count in held if count)
        return [
            f"  {' '.join(self._short(trial))}",
            size(worst.bytes),
            size(trial.left),
            f"{trial.left / room:.0%}",
            filled,
        ]

    def _short(self, trial: Trial) -> list[str]:
        """The words that differ among trials, or were chosen."""
        return [word for word in trial.words if word not in ("zero.offload=none", "checkpointing=none")]

    def command(self, trial: Trial) -> str:
        """The line that runs `trial`."""
        if self.world <= NODE:
            start = f"torchrun --standalone --nproc-per-node {self.world}"
        else:
            nodes = f"--nnodes {-(-self.world // NODE)} --nproc-per-node {NODE}"
            start = f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
        prompts = [f"generation.count={trial.settings.generation.count}"] if self.mode == "infer" else []
        return " ".join([start, "-m harness", *self.words, *self._short(trial), *prompts])

    def data(self, trials: Sequence[Trial]) -> dict[str, object]:
        """The same for a machine, every rehearsal in it. Bytes."""
        fitting = self.ranked(trials)
        return {
            "memory": self.memory,
            "reserve": self.reserve,
            "world_size": self.world,
            "trials": [
                {
                    "words": list(trial.words),
                    "fits": trial.fits,
                    "peak": None if trial.worst.failure else trial.worst.bytes,
                    "left": None if trial.worst.failure else trial.left,
                    "rank": trial.worst.rank,
                    "categories": trial.worst.categories,
                    "failure": trial.worst.failure or None,
                }
                for trial in trials
            ],
            "ranked": [list(trial.words) for trial in fitting],
            "command": self.command(fitting[0]) if fitting else None,
        }


def cost(settings: Settings) -> tuple[float, ...]:
    """What a config is ranked by, the cheapest first.

    In training the elements that a rank sends for each parameter and sequence: 2 a step under ZeRO-0 and 1, 1 a step
    and 1 a micro-batch under ZeRO-2, 3 a micro-batch under ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054,
    section 7); before it whether the host's link is used, after it the stage.
    """
    if settings.mode == "infer":
        generation = settings.generation
        return (-(generation.prompt_length + generation.max_new_tokens) * generation.batch,)
    zero, train = settings.zero, settings.train
    step = {0: 2.0, 1: 2.0, 2: 1.0 + train.accumulation, 3: 3.0 * train.accumulation}[zero.stage]
    offload = ("none", *LAST_RESORT).index(zero.offload)
    recompute = ("none", "selective", "full").index(settings.checkpointing)
    return offload, recompute, step / (train.micro_batch * train.accumulation), zero.stage


def _whole(key: str, value: str) -> int:
    if not value.isascii() or not value.isdecimal() or int(value) < 1:
        raise Refusal(key, value, "should be whole numbers of 1 or more, as 1,2,4")
    return int(value)
