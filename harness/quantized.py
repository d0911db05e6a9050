"""Models whose weights are packed: what a `quantization_config` comes to on a device, read, outlined and told."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from harness import layouts, packed
from harness.knobs import Model, Refusal, Settings
from harness.layouts import Linear, Tensors, Unknown
from harness.rules import quantized as rules

AT_LOAD = "as they are read"
AT_FIRST = "at the first forward"
"""When transformers makes packed weights whole, in the record's words."""

Chosen = tuple[str, nn.Module, Mapping[str, Any]]
"""A layer that is packed, its name, and the part of the config that says how."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are packed, on the device that it runs on.

    `given` is the `quantization_config`. `stored` is whether the checkpoint is packed; else they are packed as they are
    read. `packed` is whether they are so in memory; else they are made whole as they are read.
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
    def bits(self) -> int | None:
        """Of a weight; None where layers differ, or nobody says."""
        given, method = self.given, self.method
        if method == "bitsandbytes":
            return 4 if given.get("load_in_4bit") else 8
        if method == "compressed-tensors":
            found = {int(scheme["weights"].get("num_bits", 8)) for scheme in layouts.groups(given)}
            return found.pop() if len(found) == 1 else None
        if method == "quanto":
            return int(str(given.get("weights", "int8"))[-1])
        known = {"fp8": 8, "mxfp8": 8, "mxfp4": 4, "bitnet": 2}.get(method, given.get("bits"))
        return known if isinstance(known, int) else None

    @property
    def group(self) -> int | None:
        """Weights that share a scale; None where that is no one number."""
        if self.method == "bitsandbytes":
            return layouts.BLOCK if self.given.get("load_in_4bit") else None
        if self.method == "mxfp4":
            return 32
        if self.method == "compressed-tensors":
            found = {scheme["weights"].get("group_size") for scheme in layouts.groups(self.given)}
            group = found.pop() if len(found) == 1 else None
        else:
            group = self.given.get("group_size")
        return group if isinstance(group, int) and group > 0 else None

    def dtype(self, dtype: torch.dtype, device: str) -> torch.dtype:
        """What a model computes in that is asked to in `dtype`: on a GPU transformers has AWQ in fp16 alone."""
        fp16 = self.method == "awq" and device == "cuda" and dtype == torch.bfloat16
        return torch.float16 if fp16 else dtype

    @property
    def known(self) -> bool:
        """Whether its layout is known here."""
        return self.method in rules.METHODS

    def outlined(self, rehearsed: bool) -> bool:
        """Whether what a model takes is what its layout takes; before the first forward, where it is `rehearsed`."""
        return self.known and self.packed and (rehearsed or self.whole is None)

    def options(self, config: PretrainedConfig) -> dict[str, Any]:
        """What transformers' `from_pretrained` must be told beside `config`, which is changed."""
        given = dict(self.given) if self.packed else {**self.given, "dequantize": True}
        if self.stored:
            config.quantization_config = given
            return {}
        return {"quantization_config": AutoQuantizationConfig.from_dict(given)}

    def pack(self, model: PreTrainedModel, settings: Model) -> None:
        """Give an outline on `meta` the packed layers that it would be loaded with. Raises Refusal."""
        try:
            with torch.device("meta"), _default(model.dtype):
                if self.method in ("fp8", "mxfp8", "bitnet"):
                    self._pack_by_transformers(model)
                elif self.method == "mxfp4":
                    self._pack_experts(model)
                else:
                    self._pack_by_layout(model)
        except Unknown as unknown:
            key = f"{rules.KEY}.{unknown.key}"
            raise Refusal(
                key, unknown.value, f"{unknown.reason}; {rules.KEY}=null has weights whole"
            ) from None
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            told = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
            raise rules.refusal(settings, self.given, f"its layout cannot be made: {told}") from error
        if self.whole == AT_FIRST:
            packed.make_whole_at_first(model)

    def _pack_by_layout(self, model: PreTrainedModel) -> None:
        for name, module, given in [*self._chosen(model)]:
            out, into = _shape(module)
            tensors = layouts.LAYOUTS[self.method](given, Linear(out, into, model.dtype))
            bias = getattr(module, "bias", None)
            if bias is not None and self.method in ("awq", "gptq"):
                bias = bias.to(torch.float16)
            made = packed.PackedLinear(_empty(tensors), out, into, _buffer(bias))
            model.set_submodule(name, made)

    def _chosen(self, model: PreTrainedModel) -> Iterator[Chosen]:
        """The layers that its library packs."""
        if self.method == "compressed-tensors":
            yield from _matched(model, self.given)
            return
        keys = {"bitsandbytes": "llm_int8_skip_modules"}
        skip = self.given.get(keys.get(self.method, "modules_to_not_convert"))
        more = {"add_default_skips": True} if self.method == "awq" else {}
        whole = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules, **more)
        within = self.given.get("modules_in_block_to_quantize") if self.method == "gptq" else None
        packs = [name for names in within for name in names] if within else None
        kinds = (nn.Linear, Conv1D) if self.method in ("gptq", "bitsandbytes") else nn.Linear
        for name, module in model.named_modules():
            if self.method in ("awq", "gptq") and _fused(name, module):
                reason = "its experts are one tensor in transformers, and only layers are packed so"
                raise Unknown("quant_method", self.method, reason)
            if not isinstance(module, kinds) or not should_convert_module(name, whole):
                continue
            if packs is None or name.endswith(tuple(packs)):
                yield name, module, self.given

    def _pack_by_transformers(self, model: PreTrainedModel) -> None:
        """Those whose layers transformers itself replaces, and computes with by kernels that are not here."""
        if self.given.get("linear_class", "bitlinear") != "bitlinear":
            reason = "its weights are kept whole, and rounded at each use; that is not known here"
            raise Unknown("linear_class", self.given["linear_class"], reason)
        before = {*model.modules()}
        config = AutoQuantizationConfig.from_dict(dict(self.given))
        AutoHfQuantizer.from_config(config, pre_quantized=True).preprocess_model(model, dtype=model.dtype)
        for name, module in [*model.named_modules()]:
            if module in before:
                continue
            if _fused(name, module):
                packed.group_products(module)
            elif hasattr(module, "in_features"):
                own = {**module._parameters, **module._buffers}
                bias = _buffer(own.pop("bias", None))
                tensors = {key: tensor.detach() for key, tensor in own.items() if tensor is not None}
                more = {"copies": self.method == "bitnet", "norm": getattr(module, "rms_norm", None)}
                out, into = module.out_features, module.in_features
                model.set_submodule(name, packed.PackedLinear(tensors, out, into, bias, **more))

    def _pack_experts(self, model: PreTrainedModel) -> None:
        """The experts of gpt-oss: nothing else is packed in mxfp4."""
        text = model.config.get_text_config(decoder=True)
        whole = HfQuantizer.get_modules_to_not_convert(
            model, self.given.get("modules_to_not_convert"), model._keep_in_fp32_modules
        )
        places = [
            name
            for name, module in model.named_modules()
            if type(module).__name__ == "GptOssExperts" and should_convert_module(name, whole)
        ]
        if not places:
            raise Unknown("quant_method", self.method, "it packs the experts of gpt-oss, and here are none")
        hidden, inner, experts = text.hidden_size, text.intermediate_size, text.num_local_experts
        for name in places:
            up, down = (
                _empty(layouts.mxfp4(self.given, experts, Linear(out, into, model.dtype)))
                for out, into in ((2 * inner, hidden), (hidden, inner))
            )
            model.set_submodule(name, packed.FusedExperts(up, down, inner))

    def told(self, nbytes: int) -> dict[str, Any]:
        """The record's `quantization`, of a model whose weights take `nbytes` in all once it is made."""
        return {
            "method": self.method,
            "bits": self.bits,
            "group_size": self.group,
            "whole": self.whole,
            "bytes": nbytes,
        }

    def as_read(self, model: nn.Module) -> "Quantization":
        """What it came to in a `model` that transformers read: where that lacks a kernel, weights are whole."""
        return replace(self, packed=getattr(model, "hf_quantizer", None) is not None)


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
    if method not in rules.METHODS and not AutoHfQuantizer.supports_quant_method(given):
        remedy = (
            f"transformers knows no such method; {rules.KEY}=null has weights whole where they are random"
        )
        raise rules.refusal(settings.model, given, remedy)
    packs = rules.packed(given, device, _capability(settings, device))
    rules.check_given(settings, given, packs)
    return Quantization(method, given, own is not None, bool(packs) and settings.mode == "infer")


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


def _matched(model: PreTrainedModel, given: Mapping[str, Any]) -> Iterator[Chosen]:
    """As compressed_tensors/utils/match.py: by `re:` and a pattern of the name, a whole name, or a class."""
    ignore = given.get("ignore") or []
    for name, module in model.named_modules():
        if _matches(name, module, ignore):
            continue
        scheme = next(
            (each for each in layouts.groups(given) if _matches(name, module, each["targets"])), None
        )
        if scheme is not None and isinstance(module, nn.Linear):
            yield name, module, scheme
        elif scheme is not None and isinstance(module, nn.Embedding):
            raise Unknown("config_groups", scheme["targets"], "packed embeddings are not known here")


def _matches(name: str, module: nn.Module, targets: Any) -> bool:
    import re

    kinds = {kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module)}
    return any(
        re.match(target.removeprefix("re:"), name) is not None
        if target.startswith("re:")
        else target == name or target in kinds
        for target in targets
    )


def _fused(name: str, module: nn.Module) -> bool:
    """Whether `module` is all experts of a layer, their weights in one tensor."""
    return name.endswith(".experts") and any(
        parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values()
    )


def _shape(module: nn.Module) -> tuple[int, int]:
    """[out, into] of a layer's weight."""
    if isinstance(module, Conv1D):
        into, out = module.weight.shape
        return out, into
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def _empty(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}


def _buffer(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """What layers are made in that are not told, as transformers has it while it makes a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
