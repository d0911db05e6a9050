"""What is `auto` in a request, decided once, before any work: what a run's config says is what ran, on any machine."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from harness.config.rules.sources import identity_in
from harness.config.settings import Refusal, Settings
from harness.model import init_weights, shape
from harness.model.loader import model_config
from harness.runtime import peak_rates

ATTENTIONS = ("sdpa", "eager")


class Resolved(NamedTuple):
    """Settings without `auto`, and by key what it came to and why, as `record.json` has it."""

    settings: Settings
    reasons: Mapping[str, str] = {}


def resolve(settings: Settings, device: str | None = None) -> Resolved:
    """`settings` with a value for each `auto`, for a run on this machine's `device` ("cpu" or "cuda").

    A rehearsal, which has none, decides as the run would: by the kind of its hardware, and for a CPU by this one.
    Raises Refusal for a model that transformers cannot make, or not with the attention that is asked for.
    """
    reasons = {}
    value: Any
    if settings.precision == "auto":
        value, why = _precision(settings, device)
        settings = replace(settings, precision=value)
        reasons["precision"] = f"{value}: {why}"
    value, why = _attention(settings)
    if settings.model.attention == "auto":
        settings = replace(settings, model=replace(settings.model, attention=value))
        reasons["model.attention"] = f"{value}: {why}"
    if unread := shape.left_out(settings.model):
        reasons["model.config"] = unread
    return Resolved(settings, reasons)


def _precision(settings: Settings, device: str | None) -> tuple[str, str]:
    """The precision, and why."""
    if settings.train.resume is not None:
        before = identity_in(Path(settings.train.resume)).get("precision")
        if before in ("bf16", "fp32"):
            return before, "that of the run which is resumed"
    if (device or settings.hardware.device) == "cuda":
        if device is None or torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "a GPU has units for it"
        return "fp32", "this GPU has no units for bf16"
    return peak_rates.precision_of_cpu()


def _attention(settings: Settings) -> tuple[str, str]:
    """How the model computes attention, and why."""
    model = settings.model
    config = model_config(model)
    kind, wanted = config.model_type, config._attn_implementation
    if model.attention == "auto":
        if wanted not in (None, *ATTENTIONS):
            remedy = f"the model's config asks for {wanted}; say model.attention=sdpa or eager"
            raise Refusal("model.attention", "auto", remedy)
        chosen = _chosen(config, wanted)
        if wanted is not None:
            return chosen, "the model's config asks for it"
        if chosen == "eager":
            return chosen, f"transformers has no sdpa for {kind}"
        return chosen, f"transformers' own choice for {kind}"
    own = _chosen(config, None)
    if model.attention != own and _chosen(config, model.attention, own) != model.attention:
        remedy = f"transformers has no {model.attention} for {kind}; use {own}, or auto"
        raise Refusal("model.attention", model.attention, remedy)
    return model.attention, ""


def _chosen(config: PretrainedConfig, wanted: str | None, instead: str = "") -> str:
    """What transformers makes of `wanted`; `instead` where it refuses it. Raises Refusal where it makes no model."""
    try:
        made = init_weights.outline(copy.deepcopy(config), torch.float32, wanted)
    except Refusal:
        if instead:
            return instead
        raise
    return str(made.config._attn_implementation)
