"""`deepspeed.config=FILE`: DeepSpeed's config file as the `key=value` overrides that mean the same."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from pydantic import TypeAdapter, ValidationError

from harness.config.deepspeed_json import KEY, read
from harness.config.deepspeed_keys import AUTO, KEYS, ZERO, Moot, Passed, Refused, Setting
from harness.config.refusal import nearest
from harness.config.settings import Refusal, Settings, as_typed

SPELLED = {"zero.stage": "zero", "checkpointing.mode": "checkpointing", "optimizer.kind": "optimizer"}
"""Settings that a group sets, and the group."""

OPTIMIZERS = {
    **dict.fromkeys(("Adam", "AdamW"), "adamw"),
    **{name: name.lower() for name in ("Adafactor", "Lion", "Muon", "SGD")},
    "AdamW8bit": "adamw_8bit",
}
"""DeepSpeed's optimizers, and the `optimizer.kind` of each. The last is not its own: a run leaves it in its file."""

ABSENT: dict[str, dict[str, Any]] = {
    "lion": {"betas": [0.9, 0.99], "weight_decay": 0.0},
    "muon": {"betas": [0.9, 0.95], "epsilon": 1e-10, "weight_decay": 0.0},
    "sgd": {"weight_decay": 0.0},
    "adafactor": {"weight_decay": 0.0},
    "adamw_8bit": {"weight_decay": 0.01},
}
"""The values of fields of `train` that a type without them has."""
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedules, and the `train.schedule` of each."""

BATCH = {
    "train.micro_batch": "train_micro_batch_size_per_gpu",
    "train.accumulation": "gradient_accumulation_steps",
}

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Expanded:
    """Overrides without `deepspeed.config=`, and what became of the keys of its file.

    `auto` has the settings that the file leaves to us, `absent` those that it leaves to DeepSpeed, `moot` its own keys
    that change nothing here.
    """

    arguments: list[str]
    file: str = ""
    auto: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    moot: list[str] = field(default_factory=list)

    def reasons(self, settings: Settings) -> dict[str, str]:
        """For each setting that the file left to us its value and the reason, as `record.json` has it."""
        if not self.file:
            return {}
        parts = [
            f"{words} {', '.join(names)}"
            for words, names in (("DeepSpeed's own:", self.absent), ("no effect here:", self.moot))
            if names
        ]
        why = f"{self.file}: its keys are settings now"
        values = {key: _value(settings, key) for key in self.auto}
        return {KEY: "; ".join([why, *parts])} | {
            key: f"{as_typed(value)}: auto in {self.file}" for key, value in values.items()
        }


def expanded(arguments: Sequence[str]) -> Expanded:
    """`arguments` with each key of the file of `deepspeed.config=` as an override. Raises Refusal.

    A key that the file leaves out has DeepSpeed's default; one that it sets to `auto` has ours. What is typed must not
    differ from what the file says.
    """
    typed = dict(_typed(argument) for argument in arguments if "=" in argument)
    path = typed.get(KEY, "")
    if path in ("", "null"):
        return Expanded([*arguments])
    if typed.get("mode") == "infer":
        raise Refusal(KEY, path, "it configures training, and mode=infer uses no DeepSpeed; leave it out")
    others = [each for each in arguments if not each.lstrip("+").startswith(f"{KEY}=")]
    return _File(path, typed).expanded(others)


def _typed(argument: str) -> tuple[str, str]:
    """The key and the value of an override, without the quotes that Hydra's grammar wants around some values."""
    key, _, value = argument.lstrip("+").partition("=")
    return key, value.strip("'\"")


def _value(settings: Settings, key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return list(value) if isinstance(value, tuple) else value


class _File:
    """A config file under the overrides that are `typed` beside it."""

    def __init__(self, path: str, typed: Mapping[str, str]) -> None:
        self.path, self.typed = path, typed
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.options: dict[str, Any] = {}
        self.read: dict[str, Any] = {}
        self.auto: list[str] = []
        self.absent: list[str] = []
        self.moot: list[str] = []
        self.tree = read(path)
        for key, value in self._leaves(self.tree):
            self._take(key, value)

    def expanded(self, arguments: list[str]) -> Expanded:
        """The file's settings and options after `arguments`."""
        self._precision()
        self._zero()
        self._optimizer()
        self._reduction()
        self._checkpointing()
        self._batch()
        self._leave_to_deepspeed()
        values = [f"{SPELLED.get(key, key)}={as_typed(value)}" for key, value in self.values.items()]
        options = [f"deepspeed.options.{key}={_quoted(value)}" for key, value in self.options.items()]
        auto = [key for key in dict.fromkeys(self.auto) if key not in self.values]
        return Expanded([*arguments, *values, *options], self.path, auto, self.absent, self.moot)

    def refusal(self, key: str, value: Any, why: str) -> Refusal:
        """A refusal of the file for its `key`."""
        return Refusal(KEY, self.path, f"its {key}={json.dumps(value)[:80]}: {why}")

    def _leaves(self, tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            key = f"{prefix}{name}"
            section = any(known.startswith(f"{key}.") for known in KEYS)
            if key in KEYS:
                yield key, value
            elif section and isinstance(value, Mapping):
                yield from self._leaves(value, f"{key}.")
            elif section and value is not None:
                inside = next(known for known in KEYS if known.startswith(f"{key}."))
                raise self.refusal(key, value, f"should have keys, as {inside}")
            elif not section:
                raise self.refusal(
                    key, value, nearest(key, KEYS).replace("; --help lists them all", " of DeepSpeed")
                )

    def _take(self, key: str, value: Any) -> None:
        entry = KEYS[key]
        if isinstance(entry, Refused):
            if not _off(entry, value):
                raise self.refusal(key, value, entry.why)
        elif isinstance(entry, Moot):
            self.moot.append(key)
        elif value is None:
            return
        elif value == AUTO:
            self.read[key] = AUTO
            if isinstance(entry, Setting):
                self.auto.append(entry.key)
        else:
            try:
                value = TypeAdapter(entry.kind).validate_python(value)
            except ValidationError as error:
                why = error.errors()[0]["msg"].removeprefix("Input ").removeprefix("Value error, ")
                raise self.refusal(key, value, why) from None
            if isinstance(entry, Setting):
                self._set(entry.key, list(value) if isinstance(value, tuple) else value, key)
            elif isinstance(entry, Passed):
                self._pass(key, value, entry.ours)
            else:
                self.read[key] = value

    def _set(self, setting: str, value: Any, source: str) -> None:
        """Take `value` for a setting. Raises Refusal where another key of the file, or the user, says otherwise."""
        if setting in self.values and self.values[setting] != value:
            other = f"its {self.sources[setting]}={json.dumps(self.values[setting])} differs; leave one out"
            raise self.refusal(source, value, other)
        typed_key, typed = self._typed(setting)
        if typed is None:
            self.values[setting], self.sources[setting] = value, source
        elif not _equal(typed, value):
            raise self._differs(typed_key, typed, source, self.read.get(source, value))

    def _pass(self, key: str, value: Any, ours: Any) -> None:
        """Take `value` for an option, unless it is what the engine sets anyway. Raises Refusal as `_set` does."""
        typed = self.typed.get(f"deepspeed.options.{key}")
        if typed is None:
            if value != ours:
                self.options[key] = value
        elif not _equal(typed, value):
            raise self._differs(f"deepspeed.options.{key}", typed, key, value)

    def _differs(self, typed_key: str, typed: str, source: str, value: Any) -> Refusal:
        """What is typed is not what the file has."""
        remedy = f'{self.path} has {source}={json.dumps(value)}; leave one out, or write "auto" there'
        return Refusal(typed_key, typed, remedy)

    def _typed(self, setting: str) -> tuple[str, str | None]:
        """The key with which the user sets a setting, and the text; None where the user does not."""
        names = (setting, SPELLED.get(setting, setting))
        return next(((name, self.typed[name]) for name in names if name in self.typed), (setting, None))

    def _unset(self, setting: str) -> bool:
        return setting not in self.values and setting not in self.auto and self._typed(setting)[1] is None

    def _precision(self) -> None:
        enabled, fp16 = self.read.get("bf16.enabled"), self.tree.get("fp16")
        if enabled == AUTO or (isinstance(fp16, Mapping) and fp16.get("enabled") == AUTO and enabled is None):
            self.auto.append("precision")
        elif enabled and self._typed("precision")[1] == "fp8":
            pass  # its parameters are in bf16
        elif enabled is not None:
            self._set("precision", "bf16" if enabled else "fp32", "bf16.enabled")
        elif self._unset("precision"):
            self._by_deepspeed("precision", "fp32")
        names = ("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states")
        masters, states = (self.read.get(name) is True for name in names)
        if masters != states:
            why = "DeepSpeed would compile an AdamW of its own for one without the other; set both, or none"
            raise self.refusal(names[0], masters, why)
        if masters:
            self._set("optimizer.state", "bf16", names[0])

    def _zero(self) -> None:
        devices = {
            name: self.read.get(f"{ZERO}offload_{name}.device", "none") for name in ("optimizer", "param")
        }
        for name, device in devices.items():
            if device == "nvme":
                raise self.refusal(
                    f"{ZERO}offload_{name}.device", device, "offload is to the CPU here; write cpu"
                )
            if device != "cpu":
                section = f"{ZERO}offload_{name}."
                self.options = {
                    key: value for key, value in self.options.items() if not key.startswith(section)
                }
        if AUTO in devices.values():
            self.auto.append("zero.offload")
            return
        if devices["param"] == "cpu" and devices["optimizer"] != "cpu":
            why = (
                'parameters are offloaded with the optimizer here; add "offload_optimizer": {"device": "cpu"}'
            )
            raise self.refusal(f"{ZERO}offload_param.device", "cpu", why)
        offload = {"cpu": "all"}.get(devices["param"], {"cpu": "optimizer"}.get(devices["optimizer"], "none"))
        if offload != "none" or any(f"{ZERO}offload_{name}.device" in self.read for name in devices):
            name = "param" if offload == "all" else "optimizer"
            self._set("zero.offload", offload, f"{ZERO}offload_{name}.device")

    def _optimizer(self) -> None:
        kind = self.read.get("optimizer.type", AUTO)
        if kind != AUTO:
            self._kind(kind)
        name = self.read.get("scheduler.type", AUTO)
        if name != AUTO:
            if name not in SCHEDULES:
                raise self.refusal(
                    "scheduler.type", name, f"no such schedule here; one of {', '.join(SCHEDULES)}"
                )
            self._set("train.schedule", SCHEDULES[name], "scheduler.type")
            if self._unset("train.warmup_steps"):
                self._by_deepspeed("train.warmup_steps", 1000)

    def _kind(self, name: str) -> None:
        """The type of the optimizer, and what it has where the file leaves it out."""
        kinds = {each.lower(): kind for each, kind in OPTIMIZERS.items()}
        if name.lower() not in kinds:
            raise self.refusal(
                "optimizer.type", name, f"no such optimizer here; one of {', '.join(OPTIMIZERS)}"
            )
        kind = kinds[name.lower()]
        self._set("optimizer.kind", kind, "optimizer.type")
        method = self.read.get("optimizer.params.ns_method", "gram")
        if kind == "muon" and method != "standard":
            why = "Muon's iteration is the standard one here; write standard"
            raise self.refusal("optimizer.params.ns_method", method, why)
        adamw: dict[str, Any] = {"weight_decay": 0.01 if self._has("optimizer.params.torch_adam") else 0.0}
        for field_name, value in ABSENT.get(kind, adamw).items():
            if self._unset(f"train.{field_name}"):
                self._by_deepspeed(f"train.{field_name}", value)

    def _reduction(self) -> None:
        """Refuse another way to reduce gradients than the engine's, which is DeepSpeed's own for Muon in stage 3."""
        key = f"{ZERO}reduce_scatter"
        whole = self._setting("optimizer.kind") == "muon" and _whole(self._setting("zero.stage")) == 3
        if self.read.get(key, AUTO) not in (AUTO, not whole):
            why = f"it changes what a rank holds; set it to {as_typed(not whole)}"
            raise self.refusal(key, self.read[key], why)

    def _checkpointing(self) -> None:
        interval = self.read.get("pipeline.activation_checkpoint_interval", AUTO)
        if interval != AUTO and interval > 0:
            source = "pipeline.activation_checkpoint_interval"
            self._set("checkpointing.mode", "full", source)
            if interval > 1:
                self._set("checkpointing.every", interval, source)

    def _batch(self) -> None:
        """The batch as DeepSpeed completes it: two of its parts give the third."""
        key = "train_batch_size"
        batch = self.read.get(key, AUTO)
        if batch == AUTO:
            return
        if self._typed("train.batch")[1] is not None:
            self._set("train.batch", batch, key)
        replicas = max(1, self._world() // (_whole(self._setting("pipeline.stages")) or 1))
        micro, steps = (_whole(self._setting(each)) for each in BATCH)
        if steps is None and self._unset("train.accumulation"):
            steps = batch // (micro * replicas) if micro else 1
        if micro is None and steps and self._unset("train.micro_batch"):
            micro = batch // (steps * replicas)
        if micro is None or steps is None:
            self._set("train.batch", batch, key)  # checked when the rest of it is known
            return
        if micro * steps * replicas != batch:
            micro, steps = max(1, micro), max(1, steps)
            parts = (f"{name}={value}" for name, value in zip(BATCH.values(), (micro, steps), strict=True))
            product = f"{' x '.join(parts)} x {replicas} replicas"
            raise self.refusal(key, batch, f"{product} is {micro * steps * replicas}; change one of them")
        for each, value in zip(BATCH, (micro, steps), strict=True):
            if self._unset(each):
                self.values[each] = value

    def _world(self) -> int:
        return _whole(self.typed.get("world.size") or os.environ.get("WORLD_SIZE")) or 1

    def _setting(self, key: str) -> Any:
        return self.values.get(key, self._typed(key)[1])

    def _leave_to_deepspeed(self) -> None:
        """DeepSpeed's defaults for what the file leaves out and the user does not set."""
        stage = _whole(self._setting("zero.stage")) or 0
        keys = ["gradient_clipping", f"{ZERO}stage"]
        if stage > 0:
            keys += [f"{ZERO}reduce_bucket_size", f"{ZERO}allgather_bucket_size"]
        if stage == 3:
            keys += [f"{ZERO}stage3_prefetch_bucket_size", f"{ZERO}stage3_param_persistence_threshold"]
        for key in keys:
            entry = KEYS[key]
            if isinstance(entry, Setting) and self._unset(entry.key):
                self._by_deepspeed(entry.key, entry.default)
        overlap = f"{ZERO}overlap_comm"
        if stage == 3 and not self._has(overlap) and f"deepspeed.options.{overlap}" not in self.typed:
            self.options[overlap] = True
            self.absent.append("overlap_comm=true")

    def _by_deepspeed(self, setting: str, value: Any) -> None:
        """Give a setting DeepSpeed's default."""
        self.values[setting] = value
        self.absent.append(f"{SPELLED.get(setting, setting)}={as_typed(value)}")

    def _has(self, key: str) -> bool:
        tree: Any = self.tree
        for name in key.split("."):
            if not isinstance(tree, Mapping) or name not in tree:
                return False
            tree = tree[name]
        return tree is not None


def _off(entry: Refused, value: Any) -> bool:
    """Whether a value of a refused key asks for nothing."""
    if isinstance(value, Mapping):
        switched = value.get(entry.switch) if entry.switch else value
        return not switched or switched == AUTO
    if isinstance(value, bool):  # no 0 and no 1
        return any(value is each for each in entry.off or (False,))
    return value in (None, AUTO, *entry.off)


def _whole(value: Any) -> int | None:
    """A whole number as it was typed; None where it is none, such as a list for `fit`."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _equal(typed: str, value: Any) -> bool:
    """Whether a text as typed is `value`."""
    if typed == as_typed(value):
        return True
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and float(typed) == value
    except ValueError:
        return False


def _quoted(value: Any) -> str:
    return QuotedString(value, Quote.single).with_quotes() if isinstance(value, str) else as_typed(value)
