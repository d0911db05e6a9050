"""An outline whose weights are packed: which layers a method packs, and what stands for them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from harness.quantization import layouts
from harness.quantization.layouts import Given, Linear, Tensors, Unknown
from harness.quantization.packed import FusedExperts, PackedLinear, group_products

Chosen = tuple[str, nn.Module, Given]
"""A layer that is packed, its name, and the part of the config that says how."""


def pack(model: PreTrainedModel, method: str, given: Given) -> None:
    """Put packed layers into `model`, an outline on `meta`, as `method` does. Raises Unknown, or what a library may."""
    with torch.device("meta"), _default(model.dtype):
        if method in ("fp8", "mxfp8", "bitnet"):
            _by_transformers(model, given)
        elif method == "mxfp4":
            _experts(model, given)
        else:
            for name, layer, own in [*_chosen(model, method, given)]:
                model.set_submodule(name, _packed(layer, method, own, model.dtype))
        if given.get("kv_cache_scheme"):
            _scale_keys_and_values(model)


def _packed(layer: nn.Module, method: str, given: Given, dtype: torch.dtype) -> PackedLinear:
    out, into = _shape(layer)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias = bias.detach().to(torch.float16 if method in ("awq", "gptq") else dtype)
    return PackedLinear(_empty(layouts.LAYOUTS[method](given, Linear(out, into, dtype))), out, into, bias)


def _chosen(model: PreTrainedModel, method: str, given: Given) -> Iterator[Chosen]:
    """The layers that its library packs."""
    if method == "compressed-tensors":
        yield from _matched(model, given)
        return
    skip = given.get("llm_int8_skip_modules" if method == "bitsandbytes" else "modules_to_not_convert")
    whole = _whole(model, skip, add_default_skips=method == "awq")
    within = given.get("modules_in_block_to_quantize") if method == "gptq" else None
    names = tuple(name for several in within for name in several) if within else ("",)
    kinds = (nn.Linear, Conv1D) if method in ("gptq", "bitsandbytes") else nn.Linear
    for name, module in model.named_modules():
        if method in ("awq", "gptq") and _fused(name, module):
            reason = "its experts are one tensor in transformers, and only layers are packed so"
            raise Unknown("quant_method", method, reason)
        if isinstance(module, kinds) and name.endswith(names) and should_convert_module(name, whole):
            yield name, module, given


def _matched(model: PreTrainedModel, given: Given) -> Iterator[Chosen]:
    """As compressed_tensors/utils/match.py: by a whole name, the name of a class, or `re:` and a pattern."""
    if given.get("use_optimized_inference"):
        raise Unknown("use_optimized_inference", True, "what its kernels take is not known here")
    ignore, groups = given.get("ignore") or [], [*layouts.groups(given)]
    for name, module in model.named_modules():
        scheme = next((each for each in groups if _matches(name, module, each["targets"])), None)
        if scheme is None or _matches(name, module, ignore):
            continue
        if isinstance(module, nn.Embedding):
            raise Unknown("config_groups", scheme["targets"], "packed embeddings are not known here")
        if isinstance(module, nn.Linear):
            yield name, module, scheme


def _scale_keys_and_values(model: PreTrainedModel) -> None:
    """What compressed-tensors has of a cache in few bits in transformers, where keys and values stay as they are."""
    for module in [*model.modules()]:
        if {"k_proj", "v_proj"} <= module._modules.keys():
            for name in ("k_scale", "v_scale"):
                module.register_buffer(name, torch.empty(1))


def _matches(name: str, module: nn.Module, targets: Sequence[str]) -> bool:
    names = {name, *(kind.__name__ for kind in type(module).__mro__)}
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    return not names.isdisjoint(targets) or any(re.match(pattern, name) for pattern in patterns)


def _by_transformers(model: PreTrainedModel, given: Given) -> None:
    """Those whose layers transformers itself makes, and computes with by kernels that are not here."""
    if given.get("linear_class", "bitlinear") != "bitlinear":
        reason = "its weights are kept whole, and rounded at each use; that is not known here"
        raise Unknown("linear_class", given["linear_class"], reason)
    before = {*model.modules()}
    config = AutoQuantizationConfig.from_dict(dict(given))
    AutoHfQuantizer.from_config(config, pre_quantized=True).preprocess_model(model, dtype=model.dtype)
    for name, module in [*model.named_modules()]:
        if module in before:
            continue
        if _fused(name, module):
            group_products(module)
        elif hasattr(module, "in_features"):
            model.set_submodule(name, _of_its_tensors(module))


def _of_its_tensors(layer: Any) -> PackedLinear:
    """The stand-in for a layer of transformers' own, with what that has."""
    own = {
        key: each.detach()
        for key, each in (*layer._parameters.items(), *layer._buffers.items())
        if each is not None
    }
    bias, norm = own.pop("bias", None), getattr(layer, "rms_norm", None)
    copies = type(layer).__name__ == "BitLinear"
    return PackedLinear(own, layer.out_features, layer.in_features, bias, copies, norm)


def _experts(model: PreTrainedModel, given: Given) -> None:
    """The experts of gpt-oss, of which alone mxfp4 is."""
    text = model.config.get_text_config(decoder=True)
    whole = _whole(model, given.get("modules_to_not_convert"))
    places = [name for name, module in model.named_modules() if type(module).__name__ == "GptOssExperts"]
    if not places:
        raise Unknown("quant_method", "mxfp4", "it packs the experts of gpt-oss, and here are none")
    hidden, inner, experts = text.hidden_size, text.intermediate_size, text.num_local_experts
    shapes = (2 * inner, hidden), (hidden, inner)
    for name in places:
        if should_convert_module(name, whole):
            up, down = (_empty(layouts.mxfp4(experts, Linear(*shape, model.dtype))) for shape in shapes)
            model.set_submodule(name, FusedExperts(up, down, inner))


def _whole(model: PreTrainedModel, skip: Any, **more: bool) -> list[str]:
    """Modules that stay whole: those of `skip`, else the head and what is tied to it."""
    found: list[str] = HfQuantizer.get_modules_to_not_convert(
        model, skip, model._keep_in_fp32_modules, **more
    )
    return found


def _fused(name: str, module: nn.Module) -> bool:
    """Whether `module` is all experts of a layer, their weights in one tensor."""
    own = module._parameters.values()
    return name.endswith(".experts") and any(each is not None and each.dim() == 3 for each in own)


def _shape(layer: nn.Module) -> tuple[int, int]:
    """[out, into] of its weight."""
    if isinstance(layer, Conv1D):
        into, out = layer.weight.shape
        return out, into
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def _empty(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """What tensors are made in that nobody tells, as transformers has it while it makes a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
