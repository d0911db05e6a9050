"""The tensors in which each method stores a linear layer's packed weight, with their shapes and dtypes.

Each layout is the one in memory after the library that reads it has loaded the weight, from the file that the docstring
names. Checked with gptqmodel 7.7, bitsandbytes 0.50, compressed-tensors 0.20 and optimum-quanto 0.2.7. Faster layouts
that a kernel creates later are not included.
"""

from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import Any, NamedTuple

import torch

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""From name to shape and dtype."""

MethodConfig = Mapping[str, Any]
"""A `quantization_config`, or a part of it."""


class Unknown(ValueError):
    """A layout that this module does not support, or that is impossible for the weight's shape: key, value, reason."""

    def __init__(self, key: str, value: Any, reason: str) -> None:
        super().__init__(key, value, reason)
        self.key, self.value, self.reason = key, value, reason


class Linear(NamedTuple):
    """A layer with a weight [out, into], in a model that computes in `dtype`."""

    out: int
    into: int
    dtype: torch.dtype


def awq(config: MethodConfig, layer: Linear) -> Tensors:
    """gptqmodel/nn_modules/qlinear/torch_awq.py; AutoAWQ's `WQLinear_GEMM`. Scales are fp16, whatever the model's
    dtype.
    """
    bits, group = _bits(config, 4), _group(config, layer)
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise Unknown("version", version, "only the layout of gemm is known here")
    _check_multiple("bits", bits, layer.out, 32 // bits, "outputs")
    groups = layer.into // group
    return {
        "qweight": ((layer.into, layer.out * bits // 32), torch.int32),
        "qzeros": ((groups, layer.out * bits // 32), torch.int32),
        "scales": ((groups, layer.out), torch.float16),
    }


def gptq(config: MethodConfig, layer: Linear) -> Tensors:
    """gptqmodel/nn_modules/qlinear/__init__.py, `PackableQuantLinear`."""
    bits, group = _bits(config, 2, 3, 4, 8), _group(config, layer, even=False)
    kind = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if kind not in ("gptq", "gptq_v2"):
        raise Unknown("checkpoint_format", kind, "only the layout of gptq is known here")
    if config.get("dynamic"):
        raise Unknown("dynamic", config["dynamic"], "layers with settings of their own are not known here")
    for features, name in ((layer.into, "inputs"), (layer.out, "outputs")):
        _check_multiple("bits", bits, features, 32, name)
    groups = ceil(layer.into / group)
    return {
        "qweight": ((layer.into // 32 * bits, layer.out), torch.int32),
        "qzeros": ((groups, layer.out // 32 * bits), torch.int32),
        "scales": ((groups, layer.out), torch.float16),
        "g_idx": ((layer.into,), torch.int32),
    }


def bitsandbytes(config: MethodConfig, layer: Linear) -> Tensors:
    """bitsandbytes/nn/modules.py, `Int8Params` and `Params4bit`; functional.py, `QuantState`."""
    elements = layer.out * layer.into
    if not config.get("load_in_4bit"):
        if config.get("llm_int8_has_fp16_weight"):
            raise Unknown(
                "llm_int8_has_fp16_weight", True, "weights that are packed at each use are not known here"
            )
        return {"weight": ((layer.out, layer.into), torch.int8), "SCB": ((layer.out,), torch.float32)}
    kind = config.get("bnb_4bit_quant_type") or "fp4"
    if kind not in ("fp4", "nf4"):
        raise Unknown("bnb_4bit_quant_type", kind, "should be fp4 or nf4")
    storage = getattr(torch, str(config.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch."))
    blocks = ceil(elements / BLOCK)
    tensors: Tensors = {
        "weight": ((ceil(elements / 2 / storage.itemsize), 1), storage),
        "quant_map": ((16,), torch.float32),
    }
    if not config.get("bnb_4bit_use_double_quant"):
        return tensors | {"absmax": ((blocks,), torch.float32)}
    return tensors | {
        "absmax": ((blocks,), torch.uint8),
        "nested_absmax": ((ceil(blocks / 256),), torch.float32),
        "nested_quant_map": ((256,), torch.float32),
        "nested_offset": ((), torch.float32),
    }


BLOCK = 64
"""Elements that share a scale in bitsandbytes' 4-bit format."""


def quanto(config: MethodConfig, layer: Linear) -> Tensors:
    """optimum/quanto/nn/qmodule.py; tensor/weights/qbytes.py and qbits.py."""
    kind = str(config.get("weights", "int8"))
    scalars: Tensors = dict.fromkeys(("input_scale", "output_scale"), ((), torch.float32))
    if kind in ("int8", "float8"):
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        return {
            "data": ((layer.out, layer.into), dtype),
            "scale": ((layer.out, 1), layer.dtype),
            **scalars,
        }
    if kind not in ("int4", "int2"):
        raise Unknown("weights", kind, "should be int8, float8, int4 or int2")
    sizes = (each for each in (128, 96, 64, 32) if layer.into > 128 and layer.into % each == 0)
    columns = next(sizes, layer.into)
    rows, per_byte = layer.out * layer.into // columns, 8 // int(kind[3:])
    return {
        "data": ((ceil(rows / per_byte), columns), torch.uint8),
        "scale": ((rows, 1), layer.dtype),
        "shift": ((rows, 1), layer.dtype),
        **scalars,
    }


def compressed_tensors(scheme: MethodConfig, layer: Linear) -> Tensors:
    """compressed_tensors/quantization/lifecycle/initialize.py, and compressors/*/base.py by `format`.

    `scheme` is one of the `config_groups`.
    """
    weights, kind = scheme["weights"], scheme["format"]
    bits, strategy = int(weights["num_bits"]), weights.get("strategy") or "tensor"
    if kind not in COMPRESSED:
        raise Unknown("format", kind, f"its layout is not known here; one of {', '.join(COMPRESSED)} is")
    scale = _scale_shape(weights, strategy, layer)
    tensors: Tensors = {"weight_scale": (scale, layer.dtype)}
    if kind == "pack-quantized":
        tensors["weight_packed"] = ((layer.out, ceil(layer.into * bits / 32)), torch.int32)
        tensors["weight_shape"] = ((2,), torch.int64)
        if not weights.get("symmetric", True):
            tensors["weight_zero_point"] = ((ceil(layer.out * bits / 32), scale[-1]), torch.int32)
        if weights.get("actorder") == "group":
            tensors["weight_g_idx"] = ((layer.into,), torch.int32)
    elif kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        scale_dtype = torch.float8_e4m3fn if kind.startswith("nv") else torch.uint8
        tensors["weight_scale"] = (scale, scale_dtype)
        tensors["weight_packed"] = ((layer.out, layer.into // 2), torch.uint8)
    else:
        floats = weights.get("type") == "float"
        tensors["weight"] = ((layer.out, layer.into), torch.float8_e4m3fn if floats else torch.int8)
        if not weights.get("symmetric", True):
            tensors["weight_zero_point"] = (scale, torch.float8_e4m3fn if floats else torch.int8)
    return tensors | _activation_scales(scheme, layer) | _tensor_group_scale(weights, strategy, "weight")


COMPRESSED = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
"""The formats of compressed-tensors with a layout here."""


def _activation_scales(config: MethodConfig, layer: Linear) -> Tensors:
    """The scales of a layer's inputs, where they are stored and not computed at each forward."""
    activations = config.get("input_activations") or {}
    strategy, dynamic = activations.get("strategy") or "tensor", activations.get("dynamic", False)
    if not activations or dynamic is True:
        return {}
    tensors = _tensor_group_scale(activations, strategy, "input")
    if dynamic == "local":
        return tensors
    tensors["input_scale"] = ((1,), layer.dtype)
    if not activations.get("symmetric", True):
        tensors["input_zero_point"] = (
            (1,),
            torch.float8_e4m3fn if activations.get("type") == "float" else torch.int8,
        )
    return tensors


def _tensor_group_scale(config: MethodConfig, strategy: str, tensor: str) -> Tensors:
    return {f"{tensor}_global_scale": ((1,), torch.float32)} if strategy == "tensor_group" else {}


def _scale_shape(config: MethodConfig, strategy: str, layer: Linear) -> tuple[int, ...]:
    """The shape of a weight's scales in compressed-tensors."""
    if strategy == "tensor":
        return (1,)
    if strategy == "channel":
        return layer.out, 1
    if strategy in ("group", "tensor_group"):
        group = int(config["group_size"])
        return layer.out, ceil(layer.into / group)
    if strategy == "block":
        rows, columns = config["block_structure"]
        return ceil(layer.out / rows), ceil(layer.into / columns)
    raise Unknown("strategy", strategy, "its scales are not known here")


def mxfp4(experts: int, layer: Linear) -> Tensors:
    """transformers/integrations/mxfp4.py: for so many experts, each weight in blocks of 32 elements that
    share a scale.
    """
    _check_multiple("quant_method", "mxfp4", layer.into, 32, "inputs")
    return {
        "blocks": ((experts, layer.out, layer.into // 32, 16), torch.uint8),
        "scales": ((experts, layer.out, layer.into // 32), torch.uint8),
        "bias": ((experts, layer.out), torch.float32),
    }


LAYOUTS: dict[str, Callable[[MethodConfig, Linear], Tensors]] = {
    "awq": awq,
    "gptq": gptq,
    "bitsandbytes": bitsandbytes,
    "quanto": quanto,
    "compressed-tensors": compressed_tensors,
}
"""The layout of a linear layer for each method."""


def groups(config: MethodConfig) -> Iterator[dict[str, Any]]:
    """The schemes in compressed-tensors' `config_groups` that pack weights, each with its format."""
    for name, scheme in (config.get("config_groups") or {}).items():
        if isinstance(scheme, list):
            raise Unknown(f"config_groups.{name}", scheme, "schemes by name are not known here; spell it out")
        if scheme.get("weights"):
            yield {**scheme, "format": scheme.get("format") or config.get("format")}


def summary(method: str, config: MethodConfig) -> tuple[int | None, int | None]:
    """Bits of a weight, and weights per scale; None where there is no single number or it is not known."""
    if method == "bitsandbytes":
        return (4, BLOCK) if config.get("load_in_4bit") else (8, None)
    if method in FIXED:
        return FIXED[method]
    if method == "compressed-tensors":
        schemes = [
            each["weights"] for each in (config.get("config_groups") or {}).values() if isinstance(each, dict)
        ]
        sizes = {(each.get("num_bits"), each.get("group_size")) for each in schemes if each}
        bits, group = sizes.pop() if len(sizes) == 1 else (None, None)
    elif method == "quanto":
        bits, group = int(str(config.get("weights", "int8"))[-1]), None
    else:
        bits, group = config.get("bits"), config.get("group_size")
    return bits if isinstance(bits, int) else None, group if isinstance(group, int) and group > 0 else None


FIXED: dict[str, tuple[int, int | None]] = {
    "fp8": (8, None),
    "mxfp8": (8, 32),
    "mxfp4": (4, 32),
    "bitnet": (2, None),
}
"""Bits of a weight and weights per scale, for methods where both are fixed."""


def _bits(config: MethodConfig, *supported: int) -> int:
    bits = config.get("bits", 4)
    if bits not in supported:
        raise Unknown("bits", bits, f"should be {' or '.join(map(str, supported))}")
    return int(bits)


def _group(config: MethodConfig, layer: Linear, even: bool = True) -> int:
    """Inputs that share a scale; -1 means all inputs."""
    group = config.get("group_size", 128)
    if not isinstance(group, int) or (group != -1 and group < 1):
        raise Unknown("group_size", group, "should be a whole number, 1 or more, or -1 for one group")
    if group == -1:
        return layer.into
    if even:
        _check_multiple("group_size", group, layer.into, group, "inputs")
    return group


def _check_multiple(key: str, value: Any, features: int, divisor: int, name: str) -> None:
    if features % divisor:
        raise Unknown(key, value, f"a layer has {features} {name}, which is no multiple of {divisor}")
