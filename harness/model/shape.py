"""A model's transformers config from the settings. Every key has an effect, or is refused with a message
that names it.
"""

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
from harness.config.errors import LONGEST, first_line, ours
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
"""Keys of transformers' configs that have no effect here, and the settings that replace them."""

HEADLESS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
"""Endings of architecture names whose head does not predict tokens."""


def config_from_settings(settings: Model) -> PretrainedConfig:
    """The config that `model.config` describes. Raises Refusal."""
    fields = copy.deepcopy(settings.config)  # transformers modifies its arguments
    shape = {key: value for key, value in fields.items() if (key, value) != (quantized.NAME, None)}
    kind = shape.pop("model_type", None)
    if kind not in CONFIG_MAPPING_NAMES:
        raise Refusal(f"{KEY}model_type", kind, _no_type(kind))
    group_values, warnings = _group_values(settings), _RopeWarnings()
    try:
        with warnings:
            config = AutoConfig.for_model(kind, **shape)
    except Exception as error:  # a config's own checks may raise any type
        raise _refused(settings, error) from error
    if warnings.messages and not group_values:
        raise Refusal(f"{KEY}rope_parameters", shape.get("rope_parameters"), warnings.messages[0])
    for name in unread(settings, config):
        if name not in group_values:
            raise Refusal(KEY + name, shape[name], f"{kind} has no such key; {_instead(name, config)}")
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        if isinstance(shape.get(name), str) and shape[name] not in ACT2FN:
            near = get_close_matches(shape[name], ACT2FN, n=1) or ["silu"]
            raise Refusal(KEY + name, shape[name], f"transformers has none of that name; it has {near[0]}")
    rope_theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if None not in (rope_theta, shape.get("rope_theta")) and rope_theta != shape["rope_theta"]:
        remedy = f"rope_parameters.rope_theta={rope_theta} comes first; set that"
        raise Refusal(f"{KEY}rope_theta", shape["rope_theta"], remedy)
    return config


def _refused(settings: Model, error: Exception) -> Refusal:
    """The error of a config's own checks as a Refusal, for the key that it names."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    fields = re.findall(r"(?:field '|`)(\w+)['`]", " ".join(lines))
    last_line = lines[-1].strip().partition(" Errors: ")[0]
    message = f"transformers refuses it: {(last_line.partition('Error: ')[2] or last_line)[:LONGEST]}"
    named = next((name for name in fields if name in settings.config), "model_type")
    return Refusal(KEY + named, settings.config.get(named), message)


def _instead(name: str, config: PretrainedConfig) -> str:
    """The advice for a key that has no effect."""
    if name in ELSEWHERE:
        return f"use {ELSEWHERE[name]}"
    known = [*(field.name for field in dataclasses.fields(config)), *config.attribute_map]
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "leave it out"


class _RopeWarnings(logging.Handler):
    """A context that collects transformers' warnings about rotary positions."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.logger = logging.getLogger("transformers.modeling_rope_utils")

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> None:
        self.level_before = self.logger.level
        self.logger.addHandler(self)
        self.logger.setLevel(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)


def left_out(settings: Model) -> str | None:
    """The keys of the model group that have no effect because `model_type` differs from the group's; None if there are
    none.
    """
    if settings.path is not None:
        return None
    names = unread(settings, config_from_settings(settings))
    kind = settings.config["model_type"]
    return f"{kind}: it has no {', '.join(names)} of model={settings.name}; left out" if names else None


def unread(settings: Model, config: PretrainedConfig) -> list[str]:
    """The keys of `model.config` that no code reads: transformers keeps or drops unknown keys silently."""
    known = {field.name for field in dataclasses.fields(config)} | {*config.attribute_map, "model_type"}
    known = known - {*ELSEWHERE} | {quantized.NAME}  # this key has rules of its own
    code, generation_fields = (
        _source(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)),
        vars(GenerationConfig()),
    )
    dropped: Mapping[str, object] = getattr(GenerationConfig, "_get_default_generation_params", dict)()

    def has_effect(name: str) -> bool:
        if name in dropped or name in ELSEWHERE:
            return False
        pattern = rf"config\.{re.escape(name)}\b|[\"']{re.escape(name)}[\"']"
        return not hasattr(config, name) or name in generation_fields or bool(re.search(pattern, code))

    return [name for name in settings.config if name not in known and not has_effect(name)]


def _group_values(settings: Model) -> Mapping[str, Any]:
    """The model group's values where `model_type` differs from the group's, without the values the user typed."""
    if settings.name not in compose.groups().get("model", ()):
        return {}
    file = compose.directory() / "model" / f"{settings.name}.yaml"
    values: Any = OmegaConf.select(OmegaConf.load(file), "config") or {}
    return {} if values.get("model_type") == settings.config.get("model_type") else values


@cache
def _source(model: Any) -> str:
    """The source code of a model class's module: a key that it never mentions is never read."""
    module = inspect.getmodule(model)
    return inspect.getsource(module) if module else ""


def check_stored(settings: Model, directory: Path) -> None:
    """Raise Refusal for a checkpoint whose config.json names a model or a head that cannot be used."""
    shape = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind, place = shape.get("model_type"), settings.path
    widths.check(shape, f"{place}/config.json: ")
    if "auto_map" in shape and kind not in CONFIG_MAPPING_NAMES:
        reason = "its model is custom code (auto_map), which is never run; give one of a type that transformers has"
        raise Refusal("model.path", place, reason)
    if kind not in CONFIG_MAPPING_NAMES:
        raise Refusal("model.path", place, f"its config.json: {_no_type(kind)}")
    names = shape.get("architectures") or []
    if names and all(str(name).endswith(HEADLESS) for name in names) and not settings.random:
        reason = f"its weights are a {names[0]}'s, which predicts no tokens; give a causal language model's"
        raise Refusal("model.path", place, f"{reason}, or take its shape alone with model.random=true")


def _no_type(kind: object) -> str:
    if kind is None:
        return 'there is no model_type; say which it is, as "llama"'
    near = get_close_matches(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else "a later transformers may have it"
    return f"this transformers has no model_type {kind}; {hint}"


@contextmanager
def building(config: PretrainedConfig) -> Iterator[None]:
    """Turn any error while a model of this config is built into a Refusal."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # a model's own code may raise any type
        if ours(error):
            raise
        raise Refusal(*_key(config), f"transformers cannot build it: {first_line(error)}") from error


def check_whole(model: torch.nn.Module, config: PretrainedConfig) -> None:
    """Raise Refusal for a model with a parameter of zero elements."""
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            zero_key = widths.nothing(config.to_dict())
            remedy = f"with it {name} would have no elements; should be 1 or more"
            place = f"{config._name_or_path}/config.json: " if config._name_or_path else KEY
            raise Refusal(*((place + zero_key, 0) if zero_key else _key(config)), remedy)


def _key(config: PretrainedConfig) -> tuple[str, object]:
    place = config._name_or_path
    return ("model.path", place) if place else (f"{KEY}model_type", config.model_type)
