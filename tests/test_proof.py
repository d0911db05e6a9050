"""A model is cut only where its stages are shown to be the whole one; which others differ, and how, is said."""

import json
from typing import Any

import pytest
from transformers import AutoConfig

from harness import proof
from harness.config import compose
from harness.settings import Refusal, load
from harness.split import uniform

PASS = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "mixtral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
    ),
    *("olmo2", "falcon", "mpt", "stablelm", "starcoder2", "gpt_neox", "cohere", "glm4", "smollm3", "exaone4"),
    "deepseek_v3",
)
FEWER = {
    "deepseek_v3": {"num_hidden_layers": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "falcon": {"num_hidden_layers": 8},
    "jamba": {"num_experts": 2},
}
"""What makes a default config quicker, and changes nothing that is proven."""
REFUSED = {
    "gpt2": "stage 1 of it fails where it is given hidden states",
    "opt": "stage 1 of it fails where it is given hidden states",
    "gpt_neo": "stage 1 of it fails where it is given hidden states",
    "biogpt": "stage 1 of it fails where it is given hidden states",
    "xglm": "its own forward changes the hidden states before stage 1's first layer",
    "nanochat": "its own forward changes the hidden states before stage",
    "gptj": "the logits of its stages differ from those of the whole",
    "jamba": "stage 1 of it fails where it is given hidden states",
}


def difference(
    kind: str,
    attention: str = "eager",
    precision: str = "bf16",
    kept: str = "dynamic",
    stages: int = 3,
    **more: Any,
) -> str | None:
    config = AutoConfig.for_model(kind, **FEWER.get(kind, {}), **more)
    split = tuple(uniform(config.get_text_config(decoder=True).num_hidden_layers, stages))
    return proof.difference(json.dumps(config.to_dict(), sort_keys=True), attention, precision, kept, split)


@pytest.mark.parametrize("kind", PASS)
def test_a_model_that_only_passes_hidden_states_on_is_cut(kind: str) -> None:
    assert difference(kind) is None


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_does_more_is_not_and_what_it_does_is_said(kind: str) -> None:
    told = difference(kind)
    assert told is not None
    assert told.startswith(REFUSED[kind])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kept", ["none", "dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_is_proven_as_the_run_will_be(attention: str, kept: str, precision: str) -> None:
    assert difference("qwen3", attention, precision, kept) is None
    assert difference("xglm", attention, precision, kept) is not None


def test_a_scale_in_its_config_decides_whether_granite_is_cut() -> None:
    assert difference("granite") is None
    assert (
        difference("granite", logits_scaling=2.0, residual_multiplier=0.5) is None
    )  # by the layers and the head
    told = difference("granite", embedding_multiplier=1.5)
    assert told is not None
    assert told.startswith("its own forward changes the hidden states before stage 1's first layer")


def test_a_loss_that_needs_every_stage_is_refused() -> None:
    assert difference("mixtral") is None
    told = difference("mixtral", kept="none", output_router_logits=True)
    assert told is not None
    assert told.startswith("the loss of its stages differ from those of the whole by")


@pytest.mark.parametrize(("words", "reason"), [(["model=gpt2"], "fails where it is given hidden states")])
def test_a_refusal_names_the_model_and_what_would_work(words: list[str], reason: str) -> None:
    settings = load(compose(["mode=train", "pipeline.stages=2", "world=rehearsed", "world.size=2", *words]))
    with pytest.raises(Refusal) as refused:
        proof.prove(settings)
    sentence = str(refused.value)
    assert sentence.startswith("pipeline.stages=2: gpt2 cannot be cut into stages: ")
    assert reason in sentence
    assert sentence.endswith("; use pipeline.stages=1")
