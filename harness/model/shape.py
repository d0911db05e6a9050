"""A model's transformers config from what was asked: all that was said counts, or is refused by name."""

import copy
import dataclasses
import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from harness.config import compose
from harness.config.rules import quantized, widths
from harness.config.settings import Model, Refusal

KEY = "model.config."
ELSEWHERE = {
    "dtype": "precision=",
    "torch_dtype": "precision=",
    "attn_implementation": "model.attention=",
    "max_new_tokens": "generation.max_new_tokens=",
    "temperature": "generation.temperature=",
    "top_k": "generation.top_k=",
    "top_p": "generation.top_p=",
    "do_sample": "generation.sample=",
}
"""Keys of transformers' configs that count for nothing here, and those that count."""

HEADLESS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
"""How architectures end that have another head than words."""


def written(settings: Model) -> PretrainedConfig:
    """The config that `model.config` says. Raises Refusal."""
    given = copy.deepcopy(settings.config)  # transformers writes into what it is given
    shape = {key: value for key, value in given.items() if (key, value) != (quantized.NAME, None)}
    kind = shape.pop("model_type", None)
    if kind not in CONFIG_MAPPING_NAMES:
        raise Refusal(f"{KEY}model_type", kind, _no_type(kind))
    page, heard = _page(settings), _Heard()
    try:
        with heard:
            made = AutoConfig.for_model(kind, **shape)
    except Exception as error:  # a config's own checks raise what they like
        raise _refused(settings, error) from error
    if heard.said and not page:
        raise Refusal(f"{KEY}rope_parameters", shape.get("rope_parameters"), heard.said[0])
    for name in unread(settings, made):
        if name not in page:
            raise Refusal(KEY + name, shape[name], f"{kind} has no such key; {_instead(name, made)}")
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        if isinstance(shape.get(name), str) and shape[name] not in ACT2FN:
            near = get_close_matches(shape[name], ACT2FN, n=1) or ["silu"]
            raise Refusal(KEY + name, shape[name], f"transformers has none of that name; it has {near[0]}")
    held = (getattr(made, "rope_parameters", None) or {}).get("rope_theta")
    if None not in (held, shape.get("rope_theta")) and held != shape["rope_theta"]:
        remedy = f"rope_parameters.rope_theta={held} comes first; set that"
        raise Refusal(f"{KEY}rope_theta", shape["rope_theta"], remedy)
    return made


def _refused(settings: Model, error: Exception) -> Refusal:
    """What a config's own checks say, by the key that it is about."""
    told = str(error).strip().splitlines() or [type(error).__name__]
    fields = re.findall(r"(?:field '|`)(\w+)['`]", " ".join(told))
    last = told[-1].strip().partition(" Errors: ")[0]
    said = f"transformers refuses it: {last.partition('Error: ')[2] or last}"
    named = next((name for name in fields if name in settings.config), "model_type")
    return Refusal(KEY + named, settings.config.get(named), said)


def _instead(name: str, made: PretrainedConfig) -> str:
    """What to write for a key that counts for nothing."""
    if name in ELSEWHERE:
        return f"use {ELSEWHERE[name]}"
    known = [*(field.name for field in dataclasses.fields(made)), *made.attribute_map]
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "leave it out"


class _Heard(logging.Handler):
    """While it is entered, what transformers only warns of in a model's rotary positions."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        self.logger = logging.getLogger("transformers.modeling_rope_utils")

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> None:
        self.level_before = self.logger.level
        self.logger.addHandler(self)
        self.logger.setLevel(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)


def left_out(settings: Model) -> str | None:
    """What of a group's page counts for nothing, because `model_type` is another than the page's; None: nothing."""
    if settings.path is not None:
        return None
    names = unread(settings, written(settings))
    kind = settings.config["model_type"]
    return f"{kind}: it has no {', '.join(names)} of model={settings.name}; left out" if names else None


def unread(settings: Model, made: PretrainedConfig) -> list[str]:
    """The keys of `model.config` that nothing reads: transformers keeps any, or drops it."""
    known = {field.name for field in dataclasses.fields(made)} | {*made.attribute_map, "model_type"}
    known = known - {*ELSEWHERE} | {quantized.NAME}  # which has rules of its own
    code, kept = _source(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(made), None)), vars(GenerationConfig())
    dropped: Mapping[str, object] = getattr(GenerationConfig, "_get_default_generation_params", dict)()

    def counts(name: str) -> bool:
        if name in dropped or name in ELSEWHERE:
            return False
        named = rf"config\.{re.escape(name)}\b|[\"']{re.escape(name)}[\"']"
        return not hasattr(made, name) or name in kept or bool(re.search(named, code))

    return [name for name in settings.config if name not in known and not counts(name)]


def _page(settings: Model) -> Mapping[str, Any]:
    """What the group says, where `model_type` is another than there: not what was typed."""
    if settings.name not in compose.groups().get("model", ()):
        return {}
    file = compose.directory() / "model" / f"{settings.name}.yaml"
    page: Any = OmegaConf.select(OmegaConf.load(file), "config") or {}
    return {} if page.get("model_type") == settings.config.get("model_type") else page


@cache
def _source(model: Any) -> str:
    """The code that a class of models is in: what it never names it does not read."""
    module = inspect.getmodule(model)
    return inspect.getsource(module) if module else ""


def check_stored(settings: Model, directory: Path) -> None:
    """Refuse a checkpoint whose config.json names no model that transformers has code for."""
    shape = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind, place = shape.get("model_type"), settings.path
    widths.check(shape, f"{place}/config.json: ")
    if "auto_map" in shape and kind not in CONFIG_MAPPING_NAMES:
        told = "its model is custom code (auto_map), which is never run; give one of a type that transformers has"
        raise Refusal("model.path", place, told)
    if kind not in CONFIG_MAPPING_NAMES:
        raise Refusal("model.path", place, f"its config.json: {_no_type(kind)}")
    names = shape.get("architectures") or []
    if names and all(str(name).endswith(HEADLESS) for name in names) and not settings.random:
        told = f"its weights are a {names[0]}'s, which has no words to choose from; give a causal model's"
        raise Refusal("model.path", place, f"{told}, or take its shape alone with model.random=true")


def _no_type(kind: object) -> str:
    if kind is None:
        return 'there is no model_type; say which it is, as "llama"'
    near = get_close_matches(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else "a later transformers may have it"
    return f"this transformers has no model_type {kind}; {hint}"


@contextmanager
def building(made: PretrainedConfig) -> Iterator[None]:
    """What the making of a model of this config may raise, as a Refusal."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # a model's own code raises what it likes
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Refusal(*_key(made), f"transformers cannot build it: {told[:200]}") from error


def check_whole(model: torch.nn.Module, made: PretrainedConfig) -> None:
    """Refuse a model that has a parameter of no elements."""
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            nothing = widths.nothing(made.to_dict())
            told = f"it is why nothing would be in {name}; should be 1 or more"
            place = f"{made._name_or_path}/config.json: " if made._name_or_path else KEY
            raise Refusal(*((place + nothing, 0) if nothing else _key(made)), told)


def _key(made: PretrainedConfig) -> tuple[str, object]:
    place = made._name_or_path
    return ("model.path", place) if place else (f"{KEY}model_type", made.model_type)
