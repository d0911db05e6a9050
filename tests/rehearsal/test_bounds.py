"""What a config takes is bounded and estimated before it is rehearsed: a bound is never more than the peak."""

from dataclasses import replace

import pytest

from harness.config import compose
from harness.config.load import load
from harness.config.settings import Settings
from harness.rehearsal import bounds
from harness.rehearsal.bounds import by_few_layers, count
from harness.rehearsal.moments import at_least, estimate
from harness.rehearsal.pool import candidates, worst

SMALL = (
    "model=tiny",
    "world.size=2",
    "world=rehearsed",
    "ledger.steps=2",
    "precision=bf16",
    "model.attention=sdpa",
)
OF_MODE = {
    "train": "train.sequence=32 train.micro_batch={batch}",
    "infer": "generation.prompt_length=24 generation.max_new_tokens=8 "
    "generation.batch={batch} generation.count={count}",
}
CONFIGS = (
    "zero=0",
    "zero=0 precision=fp32 pipeline.stages=2",
    "zero=1 precision=fp32 model.attention=eager",
    "zero=2 checkpointing=selective",
    "zero=2 zero.offload=optimizer",
    "zero=2 adapter=qlora",
    "zero=3 checkpointing=full model.config.tie_word_embeddings=true",
    "zero=3 hardware=h100-sxm",
    "mode=infer hardware=h100-sxm",
    "mode=infer generation.cache=static pipeline.stages=2",
    "mode=infer generation.cache=none generation.tensor_parallel=2",
    "mode=infer generation.batching=continuous generation.cache=paged generation.pages=40",
)
NOT_IN_PROPORTION = ("pages", "zero=3 checkpointing=full")
"""Where most of what may grow does not: a number of pages, and gradients that ZeRO-3 gathers of a small model."""

DEEP = " model.config.num_hidden_layers=9"


def settings_of(words: str, batch: int = 1) -> Settings:
    """Settings of two layers on two ranks, as `fit` rehearses them."""
    mode = "infer" if "mode=infer" in words else "train"
    of_mode = OF_MODE[mode].format(batch=batch, count=2 * batch)
    layers = "" if "num_hidden_layers" in words else "model.config.num_hidden_layers=2"
    given = [f"mode={mode}", *SMALL, *of_mode.split(), *layers.split(), *words.split()]
    return load(compose.compose(list({each.partition("=")[0]: each for each in given}.values())))


def by_shapes(settings: Settings) -> dict[str, int]:
    """What is sure of a model whose parameters are counted."""
    return bounds.by_shapes(settings, count(settings))


@pytest.mark.parametrize("words", CONFIGS)
def test_what_is_sure_is_never_more_than_the_peak(words: str) -> None:
    settings, larger = settings_of(words), settings_of(words, 6)
    surely, rehearsed, peak = by_shapes(settings), worst(settings), worst(larger).bytes
    assert not rehearsed.failure
    assert 0 < sum(surely.values()) <= rehearsed.bytes
    assert rehearsed.bytes <= sum(at_least(rehearsed.moments, settings, 1, 6).values()) <= peak
    if not any(each in words for each in NOT_IN_PROPORTION):
        expected = sum(estimate(rehearsed.moments, 1, 6).values())
        assert expected == pytest.approx(peak, rel=0.25)  # an estimate, from a sixth


def test_what_is_sure_by_shapes_is_the_state_that_is_not_sharded_or_offloaded() -> None:
    whole = by_shapes(settings_of("zero=0"))
    assert whole["optimizer"] == 6 * whole["parameters"] > 0
    assert by_shapes(settings_of("zero=0 precision=fp32")) == {
        "parameters": 2 * whole["parameters"],
        "optimizer": 4 * whole["parameters"],
    }
    assert by_shapes(settings_of("zero=2")) == {**whole, "optimizer": whole["optimizer"] // 2}
    assert by_shapes(settings_of("zero=3")) == {name: count // 2 for name, count in whole.items()}
    assert by_shapes(settings_of("zero=0 pipeline.stages=2")) == {
        name: count // 2 for name, count in whole.items()
    }
    assert by_shapes(settings_of("zero=2 zero.offload=optimizer")) == {"parameters": whole["parameters"]}
    assert by_shapes(settings_of("zero=3 zero.offload=all")) == {}
    beside = by_shapes(settings_of("zero=2 adapter=lora"))
    packed = by_shapes(settings_of("zero=2 adapter=qlora"))
    assert packed["optimizer"] == beside["optimizer"]
    assert packed["parameters"] < beside["parameters"] // 2
    assert by_shapes(settings_of("mode=infer")) == {"parameters": whole["parameters"]}


def test_nothing_is_sure_where_options_of_deepspeed_or_packed_weights_may_change_the_state() -> None:
    assert (
        by_shapes(settings_of("zero=1 deepspeed.options.zero_optimization.round_robin_gradients=true")) == {}
    )
    assert by_shapes(settings_of("mode=infer model.config.quantization_config.quant_method=fp8")) == {}


@pytest.mark.parametrize("words", ["zero=1", "zero=3 checkpointing=full", "mode=infer"])
def test_what_few_layers_let_expect_is_near_the_peak(words: str) -> None:
    settings = settings_of(words + DEEP, 2)
    expected = sum(estimate(by_few_layers(candidates(settings).settings), 2, 2).values())
    assert expected == pytest.approx(worst(settings).bytes, rel=0.1)  # an estimate


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            "zero=1", id="the rank with the largest partition has another part of the model in each"
        ),
        pytest.param("zero=2 zero.offload=optimizer", id="a bucket is full from the third layer on"),
        pytest.param("zero=3 zero.offload=all", id="all of a small model is gathered at once"),
    ],
)
def test_what_only_a_few_layers_have_is_not_expected_of_a_large_model(words: str) -> None:
    large = (
        "model=llama3-8b model.config.num_hidden_layers=32 hardware=h100-sxm world.size=8 train.sequence=256"
    )
    settings = settings_of(f"{words} {large}")
    settings = replace(settings, hardware=replace(settings.hardware, memory_torch=10**12))
    expected = sum(estimate(by_few_layers(candidates(settings).settings), 1, 1).values())
    assert expected == pytest.approx(worst(settings).bytes, rel=0.15)  # an estimate


def test_few_layers_have_each_kind_and_are_not_rehearsed_where_the_whole_has_not_many() -> None:
    assert by_few_layers(settings_of("zero=1")) == ()
    assert by_few_layers(settings_of("zero=1 pipeline.stages=2" + DEEP)) == ()
    kinds = ",".join(["sliding_attention", "sliding_attention", "full_attention"] * 6)
    hybrid = "model.config.model_type=gemma2 model.config.num_hidden_layers=18"
    settings = settings_of(f"zero=1 {hybrid} +model.config.layer_types=[{kinds}]")
    expected = sum(estimate(by_few_layers(settings), 1, 1).values())
    assert expected == pytest.approx(worst(settings).bytes, rel=0.1)  # an estimate
