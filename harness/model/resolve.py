"""Replace `auto` in the settings before the run starts: the recorded config then says what ran, on any machine."""

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from harness.config.rules import fp8, optimizer
from harness.config.rules.sources import identity_in
from harness.config.settings import Hardware, Model, Refusal, Settings
from harness.model import init_weights, shape
from harness.model.loader import model_config
from harness.model.plan import Plan
from harness.runtime.launcher import per_node

ATTENTIONS = ("sdpa", "eager")

BF16_UNITS = 8.0
"""The compute capability from which on NVIDIA's GPUs have units for bf16."""
BF16_OF_CPUS = ("avx512_bf16", "amx_bf16", "bf16")
"""What torch calls the units of CPUs that multiply in bf16; the last is Arm's."""
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""The limits of oneDNN's instructions under which it has no products in bf16 (oneDNN: CPU dispatcher control)."""


def resolve(settings: Settings, device: str | None = None) -> Plan:
    """The plan of `settings`: each `auto` replaced by a value for this machine's `device` ("cpu" or "cuda").

    A rehearsal has no device: it decides by the kind of its hardware as the run would, and for a CPU by this machine's.
    Raises Refusal for a model that transformers cannot build, or cannot build with the requested attention.
    """
    reasons = {}
    value: Any
    if settings.precision == "auto":
        value, why = _precision(settings, device)
        settings = replace(settings, precision=value)
        reasons["precision"] = f"{value}: {why}"
        optimizer.check(settings)
        fp8.check(settings)
    if settings.world.per_node is None:
        value, why = _per_node(settings, device)
        settings = replace(settings, world=replace(settings.world, per_node=value))
        if why:
            reasons["world.per_node"] = f"{value}: {why}"
    config = model_config(settings.model)
    value, why = _attention(settings.model, config)
    if settings.model.attention == "auto":
        settings = replace(settings, model=replace(settings.model, attention=value))
        reasons["model.attention"] = f"{value}: {why}"
    if ignored := shape.left_out(settings.model):
        reasons["model.config"] = ignored
    return Plan(settings, config, reasons)


def _precision(settings: Settings, device: str | None) -> tuple[str, str]:
    """The precision and the reason."""
    if settings.train.resume is not None:
        saved = identity_in(Path(settings.train.resume)).get("precision")
        if saved in ("bf16", "fp32", "fp8"):
            return saved, "that of the run which is resumed"
    if (device or settings.hardware.device) == "cuda":
        if _has_bf16_units(settings.hardware, device):
            return "bf16", "a GPU has units for it"
        return "fp32", "this GPU has no units for bf16"
    units = torch.cpu.get_capabilities() if torch.backends.mkldnn.is_available() else {}
    return precision_of_cpu(units, os.environ)


def precision_of_cpu(units: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[str, str]:
    """The precision and the reason for a CPU that has `units`, as `torch.cpu.get_capabilities` names them.

    It is the same at every start, because nothing is timed. With units for bf16 oneDNN multiplies about twice as fast
    in it; without them it has three quarters of the speed of fp32 or less.
    """
    if not any(units.get(unit) for unit in BF16_OF_CPUS):
        return "fp32", "this CPU has no units for bf16 that oneDNN uses"
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if (limit := environment.get(name, "")).upper() in WITHOUT_BF16:
            return "fp32", f"{name}={limit} leaves this CPU's units for bf16 unused"
    return "bf16", "this CPU has units for it"


GPUS = 8
"""The GPUs that a rehearsal assumes on a node."""


def _per_node(settings: Settings, device: str | None) -> tuple[int | None, str]:
    """The ranks on each node, and the reason if they are assumed. None: not known, or nodes have different numbers."""
    if device is not None:
        local = per_node() if "WORLD_SIZE" in os.environ else 1  # without a launcher, a world of one
        return local, "" if local else "the launcher does not say, or nodes have different numbers of ranks"
    size = settings.world.size or 1
    if size == 1:
        return 1, ""
    if settings.hardware.device == "cuda":
        if settings.network.per_node is not None:
            return min(settings.network.per_node, size), f"as network={settings.network.name} has them"
        return min(GPUS, size), f"assumed; world.per_node= says how many of {size} ranks are on a node"
    return size, "assumed: all on one node"


def _has_bf16_units(hardware: Hardware, device: str | None) -> bool:
    """Whether the GPU has units for bf16: this machine's, or that of the page, where a capability is known."""
    if device is not None:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return hardware.capability is None or hardware.capability >= BF16_UNITS


def _attention(model: Model, config: PretrainedConfig) -> tuple[str, str]:
    """The attention implementation and the reason."""
    kind, requested = config.model_type, config._attn_implementation
    if model.attention == "auto":
        if requested not in (None, *ATTENTIONS):
            remedy = f"the model's config requests {requested}; use model.attention=sdpa or eager"
            raise Refusal("model.attention", "auto", remedy)
        used = _used_attention(config, requested)
        if requested is not None:
            return used, "the model's config requests it"
        if used == "eager":
            return used, f"transformers has no sdpa for {kind}"
        return used, f"transformers' own choice for {kind}"
    default = _used_attention(config, None)
    if model.attention != default and _used_attention(config, model.attention, default) != model.attention:
        remedy = f"transformers has no {model.attention} for {kind}; use {default}, or auto"
        raise Refusal("model.attention", model.attention, remedy)
    return model.attention, ""


def _used_attention(config: PretrainedConfig, wanted: str | None, instead: str = "") -> str:
    """The attention implementation that transformers uses for `wanted`; `instead` where it refuses. Raises Refusal
    without `instead`.
    """
    try:
        model = init_weights.outline(copy.deepcopy(config), torch.float32, wanted)
    except Refusal:
        if instead:
            return instead
        raise
    return str(model.config._attn_implementation)
