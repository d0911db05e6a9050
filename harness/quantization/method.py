"""A model whose weights are packed: what its `quantization_config` comes to on a device."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

from harness.config.rules import quantized as rules
from harness.config.rules.quantized import AT_FIRST, AT_LOAD
from harness.config.settings import Model, Settings
from harness.quantization import layouts, packed, packing
from harness.quantization.layouts import Unknown


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are packed, on the device that it runs on.

    `given` is the `quantization_config`. `stored` is whether the checkpoint is packed; else weights are packed as they
    are read. `packed` is whether they are so in memory; else they are made whole as they are read.
    """

    method: str
    given: Mapping[str, Any]
    stored: bool
    packed: bool

    @property
    def whole(self) -> str | None:
        """When they are made whole; None where they stay packed."""
        if not self.packed:
            return AT_LOAD
        return AT_FIRST if self.method == "compressed-tensors" else None

    @property
    def known(self) -> bool:
        """Whether its layout is known here."""
        return self.method in rules.METHODS and rules.METHODS[self.method].layout

    def stays(self, rehearsed: bool) -> bool:
        """Whether its layout is what a model takes for as long as it runs; of a `rehearsed` one, at first."""
        return self.known and self.packed and (rehearsed or self.whole is None)

    def dtype(self, dtype: torch.dtype, device: str) -> torch.dtype:
        """What a model computes in that is asked to in `dtype`: on a GPU transformers has AWQ in fp16 alone."""
        fp16 = self.method == "awq" and device == "cuda" and dtype == torch.bfloat16
        return torch.float16 if fp16 else dtype

    def options(self, config: PretrainedConfig) -> dict[str, Any]:
        """What transformers' `from_pretrained` must be told beside `config`, which is changed."""
        for name in rules.METHODS.get(self.method, rules.Method()).packages:
            logging.getLogger(name).setLevel(logging.ERROR)  # bitsandbytes warns at each product
        given = dict(self.given) if self.packed else {**self.given, "dequantize": True}
        if self.stored:
            config.quantization_config = given
            return {}
        return {"quantization_config": AutoQuantizationConfig.from_dict(given)}

    def pack(self, model: PreTrainedModel, settings: Model) -> None:
        """Give an outline on `meta` the packed layers that it would be loaded with. Raises Refusal."""
        try:
            packing.pack(model, self.method, self.given)
        except Unknown as unknown:
            told = f"{unknown.reason}; {rules.KEY}=null has weights whole"
            raise rules.refusal(
                settings, {**self.given, unknown.key: unknown.value}, told, unknown.key
            ) from None
        except KeyError as error:
            raise rules.refusal(settings, self.given, f"its config has no {error}") from error
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            told = f"its layout cannot be made ({_said(error)}); {rules.KEY}=null has weights whole"
            raise rules.refusal(settings, self.given, told, _blamed(self.given, error)) from error
        if self.whole == AT_FIRST:
            packed.make_whole_at_first(model)

    def as_read(self, model: nn.Module) -> "Quantization":
        """What it came to in a `model` that transformers read: where that lacks a kernel, weights are whole."""
        return replace(self, packed=getattr(model, "hf_quantizer", None) is not None)

    def as_record(self, nbytes: int) -> dict[str, Any]:
        """The record's `quantization`, of a model whose weights take `nbytes` in all once it is made."""
        bits, group = layouts.summary(self.method, self.given)
        return {
            "method": self.method,
            "bits": bits,
            "group_size": group,
            "whole": self.whole,
            "bytes": nbytes,
        }


def take(config: PretrainedConfig, settings: Settings, device: str) -> Quantization | None:
    """The quantization of the model of `config`, which has it no more, on a `device` ("cpu" or "cuda"). None: whole.

    In training weights are made whole. Raises Refusal for what cannot be done with them.
    """
    own = _pop(config)
    given = rules.merged({rules.NAME: own}, settings.model)
    if given is None:
        rules.check_whole(settings, own)
        return None
    method = rules.method_of(given)
    packs = rules.packed(given, device, _capability(settings, device))
    rules.check_given(settings, given, packs)
    _check_known(settings, given)
    return Quantization(method, given, own is not None, bool(packs) and settings.mode == "infer")


def _check_known(settings: Settings, given: Mapping[str, Any]) -> None:
    """Refuse a method or a value that transformers does not take, and a field that was typed amiss: it drops those."""
    remedy = rules.remedy(settings)
    if not AutoHfQuantizer.supports_quant_method(given):  # it would be read as if it were whole
        raise rules.refusal(settings.model, given, f"this transformers knows no such method; {remedy}")
    try:
        taken = AutoQuantizationConfig.from_dict(dict(given))
    except ImportError:  # a rehearsal needs no library that reads it
        return
    except Exception as error:  # a config for each method, which raises what it likes
        told = f"transformers does not take it ({_said(error)}); {remedy}"
        raise rules.refusal(settings.model, given, told, _blamed(given, error)) from error
    fields = [*signature(type(taken).__init__).parameters]
    for name in settings.model.config.get(rules.NAME) or ():
        close = [] if name in fields or name.startswith("_") else get_close_matches(name, fields, 1, 0.8)
        if close:
            told = f"{rules.method_of(given)} has no such field; did you mean {close[0]}?"
            raise rules.refusal(settings.model, given, told, name)


def _blamed(given: Mapping[str, Any], error: Exception) -> str:
    """The field that `error` speaks of, by its name or else by its value; the method where it names none."""
    said = _said(error)
    named = [name for name in given if name in said]
    return next(iter(named or [name for name, value in given.items() if str(value) in said]), "quant_method")


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _capability(settings: Settings, device: str) -> float | None:
    if device == "cuda" and settings.world.kind != "rehearsed":
        major, minor = torch.cuda.get_device_capability()
        return major + minor / 10
    return settings.hardware.capability


def _pop(config: PretrainedConfig) -> Any:
    """The `quantization_config` of `config`, or of its text model; none is left."""
    found = None
    for part in (config, config.get_text_config(decoder=True)):
        own = part.__dict__.pop(rules.NAME, None)
        found = found or (own.to_dict() if hasattr(own, "to_dict") else own)
    return found
