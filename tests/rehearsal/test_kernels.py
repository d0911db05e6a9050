"""A rehearsal for a GPU names what it computes in reference code and a GPU in kernels, for the model's own layers."""

from typing import Any

import pytest

from harness.config.settings import Hardware, Model, Settings, World
from harness.model.plan import Plan
from harness.rehearsal.all_ranks import described

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
}
HEADS = {"num_attention_heads": 4}
LINEAR = {
    **HEADS,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
FULL = {**LINEAR, "layer_types": ["full_attention", "full_attention"]}
CONV = {**HEADS, "layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}


def differences(kind: str, device: Any, **more: Any) -> str:
    model = Model(name="mine", attention="eager", config={"model_type": kind, **SIZES, **more})
    hardware, world = Hardware(name="page", device=device), World(kind="rehearsed", size=1)
    reported = described(
        Plan.of(Settings(mode="infer", precision="bf16", model=model, hardware=hardware, world=world))
    )
    return "\n".join(reported.differences)


@pytest.mark.parametrize(
    ("kind", "more", "functions", "package"),
    [
        ("qwen3_next", LINEAR, ["chunk_gated_delta_rule", "causal_conv1d_fn"], "flash-linear-attention"),
        ("mamba", {}, ["selective_scan_fn", "causal_conv1d_update"], "mamba-ssm"),
        ("mamba2", {"num_heads": 8, "head_dim": 16}, ["mamba_chunk_scan_combined"], "mamba-ssm"),
        ("lfm2", CONV, ["causal_conv1d_fn"], "causal-conv1d"),
        ("rwkv", {}, ["rwkv_linear_attention"], "kernels"),
    ],
)
def test_what_a_gpu_has_kernels_for_is_named(
    kind: str, more: dict[str, Any], functions: list[str], package: str
) -> None:
    reported = differences(kind, "cuda", **more)
    for name in [*functions, "run here as reference code", package]:
        assert name in reported
    assert "reference code" not in differences(kind, "cpu", **more)  # there it is what runs


@pytest.mark.parametrize(("kind", "more"), [("llama", HEADS), ("qwen3_next", FULL), ("gpt_oss", HEADS)])
def test_a_model_whose_layers_have_none_is_told_of_none(kind: str, more: dict[str, Any]) -> None:
    assert "reference code" not in differences(kind, "cuda", **more)
