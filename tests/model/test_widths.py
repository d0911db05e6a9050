"""Widths that cannot be computed with are a mistake in the request, named with what would do, and nothing else is."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from harness.config.settings import Model, Refusal, Settings
from harness.model import init_weights, widths
from harness.model.misfit import misfits
from harness.model.plan import Plan

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 32, "sliding_window": 8},  # transposed
}


def outline(kind: str, dtype: torch.dtype, **more: int) -> Any:
    return init_weights.outline(AutoConfig.for_model(kind, **{**BASE, **SHAPES[kind], **more}), dtype)


@pytest.mark.parametrize(
    ("kind", "more", "reported"),
    [
        (
            "qwen3_moe",
            {"moe_intermediate_size": 36},
            "model.config.moe_intermediate_size=36: experts are computed together in rows of a multiple of 16 bytes, "
            "8 elements; use 40 or use precision=fp32",
        ),
        ("mixtral", {"intermediate_size": 30}, "model.config.intermediate_size=30: .*; use 32$"),
        ("gpt_oss", {"intermediate_size": 30}, "model.config.intermediate_size=30: .*; use 32$"),
        ("gpt_oss", {"hidden_size": 60}, "model.config.hidden_size=60: .*; use 64 or use precision=fp32$"),
    ],
)
def test_rows_that_a_grouped_product_does_not_take_are_refused_by_their_key(
    kind: str, more: dict[str, int], reported: str
) -> None:
    with pytest.raises(Refusal, match=reported):
        widths.check(Model(), outline(kind, torch.bfloat16, **more))


def test_of_a_checkpoint_its_file_is_named_and_no_other_width_offered() -> None:
    given = Model(path="a/checkpoint")
    with pytest.raises(Refusal, match=r"a/checkpoint/config.json: moe_intermediate_size=30: .*no precision"):
        widths.check(given, outline("qwen3_moe", torch.bfloat16, moe_intermediate_size=30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("width", [32, 36, 30])
def test_what_is_not_refused_runs_and_what_is_does_not(kind: str, dtype: torch.dtype, width: int) -> None:
    key = "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
    model = outline(kind, dtype, **{key: width})
    try:
        widths.check(Model(), model)
        fits = True
    except Refusal:
        fits = False
    init_weights.make(model, list(init_weights.modules(model)), model, torch.device("cpu"), seed=0)
    try:
        model(input_ids=torch.ones(1, 8, dtype=torch.int64)).logits.sum().backward()
        runs = True
    except RuntimeError:
        runs = False
    assert fits == runs


def settings(**more: Any) -> Settings:
    shape = {"model_type": "qwen2", **BASE, "intermediate_size": 96, **more}
    del shape["head_dim"], shape["num_experts_per_tok"]  # one its config would check, the other it has not
    return Settings(precision="fp32", model=Model(name="mine", attention="sdpa", config=shape))


def test_a_failure_that_the_widths_come_to_by_themselves_is_refused() -> None:
    odd = settings(hidden_size=60)
    reported = r"model.config=mine: its widths do not fit together \(RuntimeError: .*\); give others"
    with pytest.raises(Refusal, match=reported), misfits(Plan.of(odd)):
        raise RuntimeError("The size of tensor a (15) must match the size of tensor b (16)")


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), Refusal("a", "b", "c"), KeyboardInterrupt()]
)
def test_any_other_failure_stays_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, misfits(Plan.of(settings())):
        raise error
    assert raised.value is error
