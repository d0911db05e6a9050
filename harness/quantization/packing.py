"""Pack the weights of a model on `meta`: choose the layers that a method packs, and replace them."""

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
from harness.quantization.layouts import Linear, MethodConfig, Tensors, Unknown
from harness.quantization.packed import FusedExperts, PackedLinear, group_products

Chosen = tuple[str, nn.Module, MethodConfig]
"""The name of a layer to pack, the layer, and its part of the config."""


def pack(model: PreTrainedModel, method: str, config: MethodConfig) -> None:
    """Replace layers of `model`, on `meta`, as `method` packs them. Raises Unknown, or any error of a library."""
    with torch.device("meta"), default_dtype(model.dtype):
        if method in ("fp8", "mxfp8", "bitnet"):
            _pack_by_transformers(model, config)
        elif method == "mxfp4":
            _pack_experts(model, config)
        else:
            for name, layer, own in [*layers_to_pack(model, method, config)]:
                model.set_submodule(name, _packed(layer, method, own, model.dtype))
        if config.get("kv_cache_scheme"):
            _scale_keys_and_values(model)


def _packed(layer: nn.Module, method: str, config: MethodConfig, dtype: torch.dtype) -> PackedLinear:
    out, into = _shape(layer)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias = bias.detach().to(torch.float16 if method in ("awq", "gptq") else dtype)
    return PackedLinear(_empty(layouts.LAYOUTS[method](config, Linear(out, into, dtype))), out, into, bias)


def layers_to_pack(model: PreTrainedModel, method: str, config: MethodConfig) -> Iterator[Chosen]:
    """The layers that the method's library packs."""
    if method == "compressed-tensors":
        yield from _matched(model, config)
        return
    skip = config.get("llm_int8_skip_modules" if method == "bitsandbytes" else "modules_to_not_convert")
    unpacked_names = _unpacked_modules(model, skip, add_default_skips=method == "awq")
    blocks = config.get("modules_in_block_to_quantize") if method == "gptq" else None
    names = tuple(name for block in blocks for name in block) if blocks else ("",)
    kinds = (nn.Linear, Conv1D) if method in ("gptq", "bitsandbytes") else nn.Linear
    for name, module in model.named_modules():
        if method in ("awq", "gptq") and _fused(name, module):
            reason = "its experts are one tensor in transformers, and only layers are packed so"
            raise Unknown("quant_method", method, reason)
        if isinstance(module, kinds) and name.endswith(names) and should_convert_module(name, unpacked_names):
            yield name, module, config


def _matched(model: PreTrainedModel, config: MethodConfig) -> Iterator[Chosen]:
    """Choose layers as compressed_tensors/utils/match.py does: by name, class name, or `re:` and a pattern."""
    if config.get("use_optimized_inference"):
        raise Unknown("use_optimized_inference", True, "what its kernels take is not known here")
    ignore, groups = config.get("ignore") or [], [*layouts.groups(config)]
    for name, module in model.named_modules():
        scheme = next((each for each in groups if _matches(name, module, each["targets"])), None)
        if scheme is None or _matches(name, module, ignore):
            continue
        if isinstance(module, nn.Embedding):
            raise Unknown("config_groups", scheme["targets"], "packed embeddings are not known here")
        if isinstance(module, nn.Linear):
            yield name, module, scheme


def _scale_keys_and_values(model: PreTrainedModel) -> None:
    """The buffers of compressed-tensors' KV cache quantization. transformers leaves keys and values unquantized."""
    for module in [*model.modules()]:
        if {"k_proj", "v_proj"} <= module._modules.keys():
            for name in ("k_scale", "v_scale"):
                module.register_buffer(name, torch.empty(1))


def _matches(name: str, module: nn.Module, targets: Sequence[str]) -> bool:
    names = {name, *(kind.__name__ for kind in type(module).__mro__)}
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    return not names.isdisjoint(targets) or any(re.match(pattern, name) for pattern in patterns)


def _pack_by_transformers(model: PreTrainedModel, config: MethodConfig) -> None:
    """Methods whose layers transformers itself creates; their kernels are not available here."""
    if config.get("linear_class", "bitlinear") != "bitlinear":
        reason = "its weights are kept whole, and rounded at each use; that is not known here"
        raise Unknown("linear_class", config["linear_class"], reason)
    before = {*model.modules()}
    parsed_config = AutoQuantizationConfig.from_dict(dict(config))
    AutoHfQuantizer.from_config(parsed_config, pre_quantized=True).preprocess_model(model, dtype=model.dtype)
    for name, module in [*model.named_modules()]:
        if module in before:
            continue
        if _fused(name, module):
            group_products(module)
        elif hasattr(module, "in_features"):
            model.set_submodule(name, _stand_in(module))


def _stand_in(layer: Any) -> PackedLinear:
    """The stand-in for a layer of transformers' own, with that layer's tensors."""
    tensors = {
        key: tensor.detach()
        for key, tensor in (*layer._parameters.items(), *layer._buffers.items())
        if tensor is not None
    }
    bias, norm = tensors.pop("bias", None), getattr(layer, "rms_norm", None)
    copies = type(layer).__name__ == "BitLinear"
    return PackedLinear(tensors, layer.out_features, layer.in_features, bias, copies, norm)


def _pack_experts(model: PreTrainedModel, config: MethodConfig) -> None:
    """Pack the experts of gpt-oss: mxfp4 supports no other model."""
    text = model.config.get_text_config(decoder=True)
    unpacked_names = _unpacked_modules(model, config.get("modules_to_not_convert"))
    names = [name for name, module in model.named_modules() if type(module).__name__ == "GptOssExperts"]
    if not names:
        raise Unknown("quant_method", "mxfp4", "it packs the experts of gpt-oss, and here are none")
    hidden, inner, experts = text.hidden_size, text.intermediate_size, text.num_local_experts
    shapes = (2 * inner, hidden), (hidden, inner)
    for name in names:
        if should_convert_module(name, unpacked_names):
            up, down = (_empty(layouts.mxfp4(experts, Linear(*shape, model.dtype))) for shape in shapes)
            model.set_submodule(name, FusedExperts(up, down, inner))


def _unpacked_modules(model: PreTrainedModel, skip: Any, **options: bool) -> list[str]:
    """The modules that stay unpacked: those in `skip`, or else the head and modules tied to it."""
    names: list[str] = HfQuantizer.get_modules_to_not_convert(
        model, skip, model._keep_in_fp32_modules, **options
    )
    return names


def _fused(name: str, module: nn.Module) -> bool:
    """Whether `module` has all experts of a layer, with their weights in one tensor."""
    own = module._parameters.values()
    return name.endswith(".experts") and any(each is not None and each.dim() == 3 for each in own)


def _shape(layer: nn.Module) -> tuple[int, int]:
    """The shape [out, into] of the layer's weight."""
    if isinstance(layer, Conv1D):
        into, out = layer.weight.shape
        return out, into
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def _empty(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Use `dtype` as the default dtype of new tensors, as transformers does while it builds a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
