"""How tokens are chosen and when a sequence ends: a checkpoint's generation config, overridden by the command line.

Nothing here imports torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.config.generation_fields import (
    BOOKKEEPING,
    HONOURED,
    KNOWN,
    MOOT,
    OWN,
    PROCESSED,
    REFUSED,
    SAMPLING,
)
from harness.config.settings import NEW_TOKENS, Generation, Refusal, as_typed

TYPED, DEFAULT = "command line", "default"
OLD_DEFAULT = 20
"""The `max_length` that older releases of transformers write where nobody has set one."""


Origin = tuple[str, object]


@dataclass(frozen=True)
class Setting:
    """A field's value, and its source: the command line, the checkpoint, the model's shape or the default.

    `moot` says why the field changes nothing; it is empty where the field has an effect.
    """

    value: Any
    source: str
    moot: str = ""


@dataclass(frozen=True)
class Strategy:
    """The effective settings by field; `seed` is for sampling, `origin` the key and value that name the checkpoint."""

    settings: Mapping[str, Setting] = field(default_factory=dict)
    seed: int = 0
    origin: Origin = ("model", None)

    def get(self, name: str) -> Any:
        """The field's value; None where it is not set, or is moot."""
        setting = self.settings.get(name)
        return None if setting is None or setting.moot else setting.value

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return bool(self.get("do_sample"))

    @property
    def ends(self) -> list[int]:
        """The tokens that end a sequence: none, one or several."""
        tokens = self.get("eos_token_id")
        return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)

    def max_new_tokens_after(self, prompt_length: int) -> int:
        """max_new_tokens after a prompt of so many tokens; below 1 where `max_length` leaves no room for any."""
        new = self.get("max_new_tokens")
        return int(self.get("max_length")) - prompt_length if new is None else int(new)

    @property
    def processed(self) -> dict[str, Any]:
        """The fields from which transformers builds its logits processors, without those that are off."""
        fields = {name: self.get(name) for name in PROCESSED}
        return {name: value for name, value in fields.items() if not _is_off(name, value)}

    def refusal(self, name: str, why: str) -> Refusal:
        """The Refusal of an effective field, for a reason that only the model's config shows."""
        return _refusal(name, self.settings[name], self.origin, why, HONOURED[name].off)

    def description(self) -> str:
        """One line with the fields that the checkpoint sets and the user did not type; empty where there are none."""
        names = [*self.processed, *(name for name in ("max_new_tokens", "max_length") if self.get(name))]
        parts = [
            f"{name} {as_typed(setting.value)[:40]}"
            for name, setting in ((name, self.settings[name]) for name in names)
            if setting.source not in (TYPED, DEFAULT)
        ]
        do_sample = self.settings.get("do_sample")
        parts = (
            ["tokens are sampled", *parts]
            if do_sample and self.samples and do_sample.source != TYPED
            else parts
        )
        return f"by its generation config: {', '.join(parts)}" if parts else ""


LIKELIEST = Strategy()
"""Always the likeliest token, and no end-of-sequence token."""


def merged(
    generation: Generation, checkpoint: Mapping[str, Any], origin: Origin = ("model", None), seed: int = 0
) -> Strategy:
    """The fields of a checkpoint's generation config, overridden by the settings in `generation`.

    `origin` is the key and value that name the checkpoint. Raises Refusal for an unknown field, for a field that
    cannot be honoured and for a value that the field cannot have.
    """
    source = "checkpoint" if origin[0] == "model.path" else "model"
    settings = {
        name: Setting(value, source)
        for name, value in checkpoint.items()
        if value is not None and name not in BOOKKEEPING
    }
    settings |= {name: Setting(value, TYPED) for name, value in _typed(generation, checkpoint).items()}
    if not generation.stop_at_eos:
        settings["eos_token_id"] = Setting(None, TYPED)
    if settings.get("do_sample", Setting(None, "")).value is None:
        settings["do_sample"] = Setting(False, DEFAULT)
    for name, setting in settings.items():
        _check(name, setting, origin)
    settings = {name: _validated(name, setting, settings, origin) for name, setting in settings.items()}
    strategy = Strategy(settings, seed, origin)
    if strategy.get("max_new_tokens") is None and strategy.get("max_length") is None:
        settings["max_new_tokens"] = Setting(NEW_TOKENS, DEFAULT)
    for name in ("temperature", "top_k", "top_p") if strategy.samples else ():
        if strategy.get(name) is None:
            settings[name] = Setting(HONOURED[name].off, DEFAULT)
    return strategy


def _typed(generation: Generation, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the user typed. `checkpoint` has the fields that null may remove although nobody knows them."""
    fields = {
        name: getattr(generation, key) for name, key in OWN.items() if getattr(generation, key) is not None
    }
    for name, value in generation.config.items():
        key = f"generation.config.{name}"
        if name not in KNOWN and not (value is None and name in checkpoint):
            close = [
                f"did you mean generation.config.{each}?" for each in get_close_matches(name, KNOWN, n=1)
            ]
            hint = next(iter(close), "see transformers' GenerationConfig")
            raise Refusal(key, value, f"no such field of a generation config; {hint}")
        if name in OWN:
            raise Refusal(key, value, f"it has a key of its own; use generation.{OWN[name]}=")
        if name in MOOT:
            raise Refusal(key, value, f"{MOOT[name]}; leave it out")
        if name == "eos_token_id" and not generation.stop_at_eos:
            raise Refusal(key, value, "generation.stop_at_eos=false ends no sequence; leave one out")
        fields[name] = value
    return fields


def _check(name: str, setting: Setting, origin: Origin) -> None:
    """Refuse an unknown field, and one that cannot be honoured."""
    if setting.value is None or name in HONOURED or name in MOOT:
        return
    if name in REFUSED:
        off, why = REFUSED[name]
        if setting.value != off:
            raise _refusal(name, setting, origin, why, off)
        return
    raise _refusal(name, setting, origin, "it is not known here", None)


def _validated(name: str, setting: Setting, settings: Mapping[str, Setting], origin: Origin) -> Setting:
    """`setting` with its value converted to the field's type, or with the reason why it is moot. Raises Refusal."""
    moot = _moot(name, setting, settings)
    typed = setting.source == TYPED
    if moot and typed and not _is_off(name, setting.value):
        remedy = "add generation.sample=true" if name in SAMPLING else "leave it out"
        raise Refusal(_key(name), setting.value, f"{moot}; {remedy}")
    if moot or setting.value is None or name not in HONOURED:
        return Setting(setting.value, setting.source, moot)
    try:
        adapter = TypeAdapter(HONOURED[name].type)
        value = adapter.validate_json(json.dumps(setting.value), strict=True)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].replace("Value error,", "Input")
        if typed:
            raise Refusal(_key(name), setting.value, message.removeprefix("Input ")) from None
        message = message.replace("Input", "it")
        raise _refusal(name, setting, origin, message, HONOURED[name].off) from None
    return Setting(adapter.dump_python(value, mode="json"), setting.source)


def _moot(name: str, setting: Setting, settings: Mapping[str, Setting]) -> str:
    """Why a field changes nothing; empty where it may change something."""
    if name in MOOT:
        return MOOT[name]
    if name in SAMPLING and not settings["do_sample"].value:
        return "the likeliest token is always taken"
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if name in (total, new):
            other = settings.get(new if name == total else total)
            if other is not None and other.value is not None and _yields(name == total, setting, other):
                return f"{new if name == total else total} sets the length"
    if name == "max_length" and setting.source != TYPED and setting.value == OLD_DEFAULT:
        return "it is transformers' old default"
    return ""


def _yields(total: bool, setting: Setting, other: Setting) -> bool:
    """Whether a length gives way to the `other` field for the same limit.

    A typed field wins; else the count of new tokens wins over the `total`.
    """
    if setting.source != other.source:
        return other.source == TYPED
    return total


def _is_off(name: str, value: Any) -> bool:
    return value is None or value == [] or (name in HONOURED and value == HONOURED[name].off)


def _refusal(name: str, setting: Setting, origin: Origin, why: str, instead: Any) -> Refusal:
    """The Refusal of a field, worded by its source."""
    if setting.source == TYPED:
        return Refusal(_key(name), setting.value, f"{why}; leave it out")
    sentence = f"its generation config has {name}={as_typed(setting.value)}: {why}"
    key, value = origin
    return Refusal(key, value, f"{sentence}; add {_key(name)}={as_typed(instead)}")


def _key(name: str) -> str:
    """The key with which the user types a field."""
    return f"generation.{OWN[name]}" if name in OWN else f"generation.config.{name}"
