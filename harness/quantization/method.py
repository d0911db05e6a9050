"""A model with packed weights: what its `quantization_config` means on a device."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

from harness.config.errors import first_line, ours
from harness.config.rules import quantized as rules
from harness.config.rules.quantized import AT_FIRST, AT_LOAD
from harness.config.settings import Model, Settings
from harness.device.capability import capability
from harness.quantization import layouts, nf4, packed, packing
from harness.quantization.layouts import Unknown
from harness.record import results


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are packed, on the device that it runs on.

    `stored`: the checkpoint is packed; otherwise weights are packed at load.
    `packed`: weights are packed in memory; otherwise they are unpacked at load.
    `trained`: others are trained beside the packed weights, with the library's own layers (`nf4.py`).
    """

    method: str
    quantization_config: Mapping[str, Any]
    stored: bool
    packed: bool
    trained: bool = False

    @property
    def whole(self) -> str | None:
        """When the weights are unpacked; None where they stay packed."""
        if not self.packed:
            return AT_LOAD
        return AT_FIRST if self.method == "compressed-tensors" else None

    @property
    def known(self) -> bool:
        """Whether `layouts.py` has the method's layout."""
        return self.method in rules.METHODS and rules.METHODS[self.method].layout

    def stays(self, read: bool) -> bool:
        """Whether the model keeps this layout in memory for the whole run; where no weights are `read`, whether it
        starts with it.
        """
        return self.known and self.packed and (not read or self.whole is None)

    def dtype(self, dtype: torch.dtype, device: str) -> torch.dtype:
        """The dtype that the model computes in, if `dtype` is requested: on a GPU transformers supports AWQ only in
        fp16.
        """
        fp16 = self.method == "awq" and device == "cuda" and dtype == torch.bfloat16
        return torch.float16 if fp16 else dtype

    def options(self, config: PretrainedConfig) -> dict[str, Any]:
        """Extra arguments for transformers' `from_pretrained`. This modifies `config`."""
        for name in rules.METHODS.get(self.method, rules.Method()).packages:
            logging.getLogger(name).setLevel(logging.ERROR)  # bitsandbytes warns at each matrix product
        quantization_config = (
            dict(self.quantization_config)
            if self.packed
            else {**self.quantization_config, "dequantize": True}
        )
        if self.stored:
            config.quantization_config = quantization_config
            return {}
        return {"quantization_config": AutoQuantizationConfig.from_dict(quantization_config)}

    def pack(self, model: PreTrainedModel, settings: Model) -> None:
        """Replace layers of a model on `meta` by the packed layers that it would be loaded with. Raises Refusal."""
        try:
            packing.pack(model, self.method, self.quantization_config)
        except Unknown as unknown:
            reason = f"{unknown.reason}; {rules.KEY}=null leaves them unpacked"
            raise rules.refusal(
                settings, {**self.quantization_config, unknown.key: unknown.value}, reason, unknown.key
            ) from None
        except KeyError as error:
            raise rules.refusal(settings, self.quantization_config, f"its config has no {error}") from error
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            reason = f"its layout cannot be made ({first_line(error)}); {rules.KEY}=null leaves them unpacked"
            raise rules.refusal(
                settings, self.quantization_config, reason, _field_in_error(self.quantization_config, error)
            ) from error
        if self.whole == AT_FIRST:
            packed.make_whole_at_first(model)

    @contextmanager
    def packing(self, model: PreTrainedModel) -> Iterator[Callable[[str, nn.Module], object]]:
        """A function that packs a part of `model`, by its name, once it has weights; at the end, the rest is packed."""
        packer = nf4.Packer(model, self.quantization_config)
        yield packer
        packer.finish()

    def as_read(self, model: nn.Module) -> "Quantization":
        """The actual state in a `model` that transformers loaded: without a kernel, it unpacks the weights."""
        return replace(self, packed=getattr(model, "hf_quantizer", None) is not None)

    def as_record(self, nbytes: int) -> results.Quantization:
        """The record's `quantization`, for a model whose weights take `nbytes` in memory."""
        bits, group = layouts.summary(self.method, self.quantization_config)
        return results.Quantization(
            method=self.method, bits=bits, group_size=group, whole=self.whole, bytes=nbytes
        )


def take(config: PretrainedConfig, settings: Settings, device: str) -> Quantization | None:
    """Remove the quantization from `config` and return it, for a `device` ("cpu" or "cuda"). None: the weights are not
    packed.

    Training unpacks the weights. Raises Refusal for settings that the quantization does not allow.
    """
    stored_config = _pop(config)
    quantization_config = rules.merged({rules.NAME: stored_config}, settings.model)
    if quantization_config is None:
        rules.check_whole(settings, stored_config)
        return of_adapter(settings)
    method = rules.method_of(quantization_config)
    packed_in_memory = rules.packed(quantization_config, device, capability(settings, device))
    rules.check_given(settings, quantization_config, packed_in_memory)
    _check_known(settings, quantization_config)
    return Quantization(
        method,
        quantization_config,
        stored_config is not None,
        bool(packed_in_memory) and settings.mode == "infer",
    )


def of_adapter(settings: Settings) -> Quantization | None:
    """How `adapter=qlora` packs the weights as they are read; None for others."""
    if settings.mode != "train" or settings.adapter.kind != "qlora":
        return None
    return Quantization(
        "bitsandbytes", nf4.config_for(settings.dtype), stored=False, packed=True, trained=True
    )


def _check_known(settings: Settings, quantization_config: Mapping[str, Any]) -> None:
    """Raise Refusal for a method or value that transformers does not support, and for misspelled fields, which it
    silently drops.
    """
    remedy = rules.remedy(settings)
    # transformers would read the weights as if they were not packed
    if not AutoHfQuantizer.supports_quant_method(quantization_config):
        raise rules.refusal(
            settings.model, quantization_config, f"this transformers knows no such method; {remedy}"
        )
    try:
        parsed = AutoQuantizationConfig.from_dict(dict(quantization_config))
    except ImportError:  # a rehearsal does not need the method's library
        return
    except Exception as error:  # each method's config may raise any type
        if ours(error):
            raise
        reason = f"transformers does not take it ({first_line(error)}); {remedy}"
        raise rules.refusal(
            settings.model, quantization_config, reason, _field_in_error(quantization_config, error)
        ) from error
    fields = [*signature(type(parsed).__init__).parameters]
    for name in settings.model.config.get(rules.NAME) or ():
        close = [] if name in fields or name.startswith("_") else get_close_matches(name, fields, 1, 0.8)
        if close:
            reason = f"{rules.method_of(quantization_config)} has no such field; did you mean {close[0]}?"
            raise rules.refusal(settings.model, quantization_config, reason, name)


def _field_in_error(quantization_config: Mapping[str, Any], error: Exception) -> str:
    """The field that `error` mentions by name, or else by value; `quant_method` where it mentions none."""
    message = first_line(error)
    mentioned = [name for name in quantization_config if name in message]
    return next(
        iter(mentioned or [name for name, value in quantization_config.items() if str(value) in message]),
        "quant_method",
    )


def _pop(config: PretrainedConfig) -> Any:
    """Remove the `quantization_config` from `config` and its text config, and return it."""
    result = None
    for part in (config, config.get_text_config(decoder=True)):
        own = part.__dict__.pop(rules.NAME, None)
        result = result or (own.to_dict() if hasattr(own, "to_dict") else own)
    return result
