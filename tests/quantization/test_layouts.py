"""Packed layers are as large as their libraries have them: every tensor by its shape and its type."""

from typing import Any

import pytest
import torch

from harness.quantization.layouts import LAYOUTS, Linear, Unknown, mxfp4, summary

I8, U8, I32, I64 = torch.int8, torch.uint8, torch.int32, torch.int64
F8, F16, BF16, F32 = torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
BYTES = {**WEIGHTS, "num_bits": 8, "strategy": "channel", "group_size": None}
FLOATS = {**BYTES, "type": "float"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def scheme(weights: Any, kind: str, **more: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": weights, "format": kind, **more}


CASES: list[tuple[str, dict[str, Any], dict[str, tuple[tuple[int, ...], torch.dtype]]]] = [
    ("awq", {}, {"qweight": ((4096, 128), I32), "qzeros": ((32, 128), I32), "scales": ((32, 1024), F16)}),
    (
        "awq",
        {"bits": 4, "group_size": -1, "version": "GEMM"},
        {"qweight": ((4096, 128), I32), "qzeros": ((1, 128), I32), "scales": ((1, 1024), F16)},
    ),
    (
        "gptq",
        {"bits": 4, "group_size": 128},
        {
            "qweight": ((512, 1024), I32),
            "qzeros": ((32, 128), I32),
            "scales": ((32, 1024), F16),
            "g_idx": ((4096,), I32),
        },
    ),
    (
        "gptq",
        {"bits": 3, "group_size": 1000},  # the last group is not whole
        {
            "qweight": ((384, 1024), I32),
            "qzeros": ((5, 96), I32),
            "scales": ((5, 1024), F16),
            "g_idx": ((4096,), I32),
        },
    ),
    (
        "gptq",
        {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
        {
            "qweight": ((1024, 1024), I32),
            "qzeros": ((1, 256), I32),
            "scales": ((1, 1024), F16),
            "g_idx": ((4096,), I32),
        },
    ),
    ("bitsandbytes", {"load_in_8bit": True}, {"weight": ((1024, 4096), I8), "SCB": ((1024,), F32)}),
    (
        "bitsandbytes",
        NF4,
        {"weight": ((2097152, 1), U8), "quant_map": ((16,), F32), "absmax": ((65536,), F32)},
    ),
    (
        "bitsandbytes",
        {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
        {
            "weight": ((1048576, 1), BF16),
            "quant_map": ((16,), F32),
            "absmax": ((65536,), U8),
            "nested_absmax": ((256,), F32),
            "nested_quant_map": ((256,), F32),
            "nested_offset": ((), F32),
        },
    ),
    (
        "quanto",
        {"weights": "float8"},
        {
            "data": ((1024, 4096), F8),
            "scale": ((1024, 1), BF16),
            "input_scale": ((), F32),
            "output_scale": ((), F32),
        },
    ),
    (
        "quanto",
        {"weights": "int4"},
        {
            "data": ((16384, 128), U8),
            "scale": ((32768, 1), BF16),
            "shift": ((32768, 1), BF16),
            "input_scale": ((), F32),
            "output_scale": ((), F32),
        },
    ),
    (
        "compressed-tensors",
        scheme(WEIGHTS, "pack-quantized"),
        {
            "weight_packed": ((1024, 512), I32),
            "weight_scale": ((1024, 32), BF16),
            "weight_shape": ((2,), I64),
        },
    ),
    (
        "compressed-tensors",
        scheme({**WEIGHTS, "symmetric": False, "group_size": 64, "actorder": "group"}, "pack-quantized"),
        {
            "weight_packed": ((1024, 512), I32),
            "weight_scale": ((1024, 64), BF16),
            "weight_shape": ((2,), I64),
            "weight_zero_point": ((128, 64), I32),
            "weight_g_idx": ((4096,), I32),
        },
    ),
    (
        "compressed-tensors",
        scheme(BYTES, "int-quantized", input_activations={"num_bits": 8, "dynamic": True}),
        {"weight": ((1024, 4096), I8), "weight_scale": ((1024, 1), BF16)},
    ),
    (
        "compressed-tensors",
        scheme({**FLOATS, "strategy": "tensor"}, "float-quantized", input_activations={"dynamic": False}),
        {"weight": ((1024, 4096), F8), "weight_scale": ((1,), BF16), "input_scale": ((1,), BF16)},
    ),
    (
        "compressed-tensors",
        scheme({**FLOATS, "strategy": "block", "block_structure": [128, 128]}, "naive-quantized"),
        {"weight": ((1024, 4096), F8), "weight_scale": ((8, 32), BF16)},
    ),
    (
        "compressed-tensors",
        scheme(
            {**WEIGHTS, "type": "float", "strategy": "tensor_group", "group_size": 16},
            "nvfp4-pack-quantized",
            input_activations={"strategy": "tensor_group", "dynamic": "local"},
        ),
        {
            "weight_packed": ((1024, 2048), U8),
            "weight_scale": ((1024, 256), F8),
            "weight_global_scale": ((1,), F32),
            "input_global_scale": ((1,), F32),
        },
    ),
    (
        "compressed-tensors",
        scheme({**WEIGHTS, "type": "float", "group_size": 32}, "mxfp4-pack-quantized"),
        {"weight_packed": ((1024, 2048), U8), "weight_scale": ((1024, 128), U8)},
    ),
]


@pytest.mark.parametrize(("method", "given", "expected"), CASES, ids=lambda case: str(case)[:60])
def test_a_layer_has_the_tensors_of_its_library(method: str, given: Any, expected: Any) -> None:
    assert LAYOUTS[method](given, Linear(1024, 4096, BF16)) == expected


def test_scales_in_the_models_type_follow_it() -> None:
    given = scheme(WEIGHTS, "pack-quantized")
    assert LAYOUTS["compressed-tensors"](given, Linear(64, 128, F32))["weight_scale"] == ((64, 1), F32)
    assert LAYOUTS["awq"]({}, Linear(64, 128, F32))["scales"] == ((1, 64), F16)


def test_experts_are_blocks_of_32_with_a_scale() -> None:
    assert mxfp4(32, Linear(5760, 2880, BF16)) == {
        "blocks": ((32, 5760, 90, 16), U8),
        "scales": ((32, 5760, 90), U8),
        "bias": ((32, 5760), F32),
    }


@pytest.mark.parametrize(
    ("method", "given", "key"),
    [
        ("awq", {"bits": 3}, "bits"),
        ("awq", {"version": "gemv"}, "version"),
        ("awq", {"group_size": 96}, "group_size"),
        ("awq", {"group_size": 0}, "group_size"),
        ("awq", {"group_size": 1.5}, "group_size"),
        ("gptq", {"bits": 5}, "bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format"),
        ("gptq", {"dynamic": {"-:down_proj": {}}}, "dynamic"),
        (
            "bitsandbytes",
            {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
            "llm_int8_has_fp16_weight",
        ),
        ("quanto", {"weights": "int3"}, "weights"),
        ("compressed-tensors", scheme(WEIGHTS, "marlin-24"), "format"),
        ("compressed-tensors", scheme({**WEIGHTS, "strategy": "attn_head"}, "pack-quantized"), "strategy"),
    ],
)
def test_what_is_not_known_is_named(method: str, given: Any, key: str) -> None:
    with pytest.raises(Unknown) as unknown:
        LAYOUTS[method](given, Linear(1024, 4096, BF16))
    assert unknown.value.key == key


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("awq", {"bits": 4, "group_size": 128}, (4, 128)),
        ("gptq", {"bits": 8, "group_size": -1}, (8, None)),
        ("bitsandbytes", NF4, (4, 64)),
        ("bitsandbytes", {"load_in_8bit": True}, (8, None)),
        ("mxfp4", {}, (4, 32)),
        ("fp8", {"weight_block_size": [128, 128]}, (8, None)),
        ("quanto", {"weights": "int4"}, (4, None)),
        ("compressed-tensors", {"config_groups": {"group_0": {"weights": WEIGHTS}}}, (4, 128)),
        (
            "compressed-tensors",
            {"config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": BYTES}}},
            (None, None),
        ),
        ("hqq", {"nbits": 4}, (None, None)),
    ],
)
def test_a_record_says_bits_and_groups_where_there_is_one_of_each(
    method: str, given: Any, expected: Any
) -> None:
    assert summary(method, given) == expected
