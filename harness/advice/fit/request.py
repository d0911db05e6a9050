"""What `harness fit` is asked: configs along axes, and the memory that they must fit into."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from harness.advice.fit.axes import AXES, OPEN, axes
from harness.config import compose
from harness.config.deepspeed_file import expanded
from harness.config.load import checked, typed
from harness.config.rules import check, check_world
from harness.config.settings import Refusal, Settings
from harness.config.variants import Tree, Variants
from harness.device.outside import Budget, budget
from harness.rehearsal import decisive
from harness.tables import size

REHEARSED = ("world=rehearsed", "ledger=exact", "ledger.steps=2")
"""Overrides of every config."""

MANAGED = ("world", "world.size", "ledger", "ledger.steps", "generation.count")
"""Keys that `fit` sets itself."""

PROMPTS = ("generation.prompts", "generation.prompt", "generation.workload")


class Request:
    """The configs along the axes, and the memory of a device. Raises Refusal and ValueError.

    `variants` are those of a request that differs in its world alone: what they have composed is not composed again.
    """

    def __init__(self, overrides: Sequence[str], reserve: int = 0, variants: Variants | None = None) -> None:
        overrides = expanded(overrides).arguments
        for override in overrides:
            if "=" not in override:
                raise ValueError(
                    f"fit: {override}: neither key=value nor an option; --help lists what there is"
                )
        self.typed = dict(override.partition("=")[::2] for override in overrides)
        self.reserve = reserve
        self.mode = self.typed.get("mode", "train")
        if self.mode not in AXES:
            raise Refusal("mode", self.mode, "no such mode; one of train, infer")
        if self.mode == "infer" and any(key in self.typed for key in PROMPTS):
            raise Refusal("generation.prompts", "...", "fit needs lengths; give generation.prompt_length=")
        self.axes = axes(self.mode, {key: value for key, value in self.typed.items() if key != "world.size"})
        self.overrides = [each for each in overrides if each.partition("=")[0] not in {*self.axes, *MANAGED}]
        world_size = self.typed.get("world.size", "")
        self.world = int(world_size) if world_size.isdecimal() else 1
        self.variants = variants or Variants([*self.overrides, *REHEARSED])
        self._composed: dict[tuple[str, ...], Settings] = {}
        self._settings: dict[tuple[str, ...], Settings] = {}  # with what was decided
        self._decided: Callable[[Settings], Settings] = lambda settings: settings
        self.reasons: dict[str, str] = {}
        """The reasons for the resolved values of keys at `auto`; empty until `decide`."""
        self.impossible: dict[str, Refusal] = {}
        """Values that `?` stands for and no config allows, as overrides, and why; empty until `combinations`."""

    @property
    def searched(self) -> str:
        """The key whose largest value is searched."""
        return [*self.axes][-1]

    @cached_property
    def values(self) -> list[int]:
        """The user's values of the searched key, sorted; empty where there are none. Raises Refusal."""
        values = [value for value in self.axes[self.searched].split(",") if value]
        return sorted({positive_integer(self.searched, value) for value in values})

    @cached_property
    def lowest(self) -> int:
        """The lowest value of the searched key. Raises Refusal."""
        return (self.values or [1])[0]

    @property
    def number(self) -> int:
        """How many combinations of the other axes there are, possible or not."""
        *others, _ = self.axes.values()
        return prod(len(values.split(",")) for values in others)

    @property
    def first(self) -> Settings:
        """The settings of the first config that is not refused. Raises Refusal where all are."""
        refusals = []
        for combination in self._product({}):
            try:
                return self.settings(self.with_value(combination, self.lowest))
            except Refusal as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def combinations(self, changed: Mapping[str, str] | None = None) -> list[tuple[str, ...]]:
        """The combinations of the other axes that the settings do not refuse, with the axes in `changed` replaced.

        Raises Refusal where no combination allows a value that the user has typed, or where none is possible at all.
        """
        possible: list[tuple[str, ...]] = []
        refused: dict[str, Refusal] = {}
        for combination in self._product(changed or {}):
            try:
                self.settings(self.with_value(combination, self.lowest))
                possible.append(combination)
            except Refusal as refusal:
                for override in combination:
                    refused.setdefault(override, refusal)
        if changed:
            return possible
        for override, reason in refused.items():
            if any(override in each for each in possible):
                continue
            typed = self.typed.get(override.partition("=")[0])
            if typed == OPEN:
                self.impossible[override] = reason
            elif typed is not None:
                raise reason
        if not possible:
            raise next(iter(refused.values()))
        return possible

    def _product(self, changed: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
        *others, _ = self.axes
        return product(
            *([f"{key}={value}" for value in changed.get(key, self.axes[key]).split(",")] for key in others)
        )

    def preference(self, overrides: Sequence[str]) -> tuple[int, ...]:
        """For each axis but the searched one the place of a config's value in its list: the first is preferred."""
        *others, _ = self.axes
        values = dict(override.partition("=")[::2] for override in overrides)
        places = {key: self.axes[key].split(",") for key in others if key in values and key != "zero.offload"}
        return tuple(listed.index(values[key]) for key, listed in places.items())

    def with_value(self, combination: Sequence[str], value: int) -> tuple[str, ...]:
        """The overrides of a config: a combination, a value of the searched key, and what follows. Raises Refusal."""
        return *combination, f"{self.searched}={value}", *self._accumulation(combination, value)

    def settings(self, chosen: Sequence[str]) -> Settings:
        """The settings that rehearse a config with the overrides `chosen`, one for each axis. Raises Refusal."""
        chosen = tuple(chosen)
        if chosen not in self._composed:
            self._composed[chosen] = self._compose(chosen)
        if chosen not in self._settings:
            self._settings[chosen] = self._decided(self._composed[chosen])
        return self._settings[chosen]

    def _compose(self, chosen: Sequence[str]) -> Settings:
        size_overrides = [f"world.size={self.typed['world.size']}"] if "world.size" in self.typed else []
        values = dict(override.partition("=")[::2] for override in chosen)
        if self.mode == "infer" and size_overrides:
            with suppress(ValueError):  # the check of the settings words it better
                count = int(values["generation.batch"]) * int(self.typed["world.size"])
                size_overrides.append(f"generation.count={count}")
        settings = checked(typed(self._tree(*chosen, *size_overrides)))
        check_world(settings, settings.world.size or 1)
        return settings

    def _tree(self, *overrides: str) -> Tree:
        try:
            return self.variants.tree(*overrides)
        except Refusal as refusal:
            if refusal.remedy != compose.SWEEP:
                raise
            lists = ", ".join(self.axes)
            raise Refusal(
                refusal.key, refusal.value, f"give one value; lists may be given for {lists}"
            ) from None

    def rehearsed(self, settings: Settings) -> Settings:
        """`settings` as they are rehearsed: what decides the peak, on a card without the memory that is kept free."""
        key = {"torch": "memory_torch", "driver": "memory_driver", "hardware.memory": "memory"}[
            self.budget.source
        ]
        less: dict[str, Any] = {key: self.budget.total - self.reserve}
        return replace(decisive(settings), hardware=replace(settings.hardware, **less))

    @cached_property
    def budget(self) -> Budget:
        """The memory of a device and how it is formed.

        Raises Refusal where it is not known, and ValueError where none is left.
        """
        settings = self.first
        formed = budget(settings.hardware, self.world)
        if formed is None:
            remedy = "fit must know the memory of a device; give hardware=NAME or hardware.memory=BYTES"
            raise Refusal("hardware.memory", None, remedy)
        if formed.bytes <= self.reserve:
            kept = f"--reserve keeps {size(self.reserve)}"
            raise ValueError(f"fit: nothing is left for a config: {formed.sentence()}; {kept}")
        return formed

    @property
    def memory(self) -> int:
        """Bytes of a device that a config may use, what is kept free included."""
        return self.budget.bytes

    @property
    def room(self) -> int:
        """Bytes of a device that a config may use."""
        return self.memory - self.reserve

    def decide(self, settings: Settings, reasons: Mapping[str, str]) -> None:
        """Take over what the keys at `auto` were resolved to, for all configs: no axis changes it."""
        self.reasons = dict(reasons)
        precision, attention = settings.precision, settings.model.attention

        def decided(each: Settings) -> Settings:
            resolved = replace(each, precision=precision, model=replace(each.model, attention=attention))
            check(resolved)
            return resolved

        self._decided = decided
        self._settings = {}

    def _accumulation(self, combination: Sequence[str], micro_batch: int) -> Iterator[str]:
        """The accumulation that reaches the user's `train.batch`, if one is set. Raises Refusal where none does."""
        if self.mode == "train" and "train.batch" in self.typed and "train.accumulation" not in self.typed:
            stages = dict(override.partition("=")[::2] for override in combination)["pipeline.stages"]
            dp_size = max(1, self.world // positive_integer("pipeline.stages", stages))
            batch = positive_integer("train.batch", self.typed["train.batch"])
            sequences = micro_batch * dp_size
            if batch % sequences:
                raise Refusal(
                    "train.batch", batch, f"no multiple of train.micro_batch={micro_batch} on {dp_size}"
                )
            yield f"train.accumulation={batch // sequences}"


def positive_integer(key: str, value: str) -> int:
    """The whole number that `value` is. Raises Refusal where it is none of 1 or more."""
    if not value.isascii() or not value.isdecimal() or int(value) < 1:
        raise Refusal(key, value, "should be whole numbers of 1 or more, as 1,2,4")
    return int(value)
