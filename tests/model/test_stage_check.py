"""A model is cut only where its stages are shown to be the whole one; which others differ, and how, is said."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from harness.config.compose import compose
from harness.config.load import Refusal, load
from harness.model import stage_check
from harness.model.partition import uniform
from harness.model.plan import Plan

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
    *("deepseek_v3", "gptj", "codegen", "apertus", "llama4_text"),
)
FEWER = {
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "llama4_text": {"num_local_experts": 4},
    "jamba": {"num_experts": 2, "num_hidden_layers": 32},
    "gpt_neo": {"num_hidden_layers": 24},
}
"""What makes a default config quicker, and changes nothing that is proven."""
LAYERS = 7
"""More than the period of any kind's layers."""
REFUSED = {
    "gpt2": "stage 1 of it fails where it is given hidden states",
    "opt": "stage 1 of it fails where it is given hidden states",
    "gpt_neo": "stage 1 of it fails where it is given hidden states",
    "biogpt": "stage 1 of it fails where it is given hidden states",
    "xglm": "its own forward changes the hidden states before stage 1's first layer",
    "nanochat": "its own forward changes the hidden states before stage",
    "jamba": "stage 1 of it fails where it is given hidden states",
}


TYPICAL = ("mixtral", "gemma3_text", "deepseek_v3", "llama4_text", "gpt2", "xglm", "nanochat", "jamba")
"""One of each way in which a model passes hidden states on or does more: experts, windows, latents, positions."""


def kinds(names: Iterable[str]) -> list[Any]:
    """These types of models as pytest's parameters."""
    marks = [pytest.mark.exhaustive]
    return [pytest.param(name, marks=[] if name in TYPICAL else marks) for name in names]


def difference(
    kind: str,
    attention: str = "eager",
    dtype: str = "bfloat16",
    kept: str = "dynamic",
    stages: int = 3,
    trains: bool = False,
    **more: Any,
) -> str | None:
    config = AutoConfig.for_model(kind, **{"num_hidden_layers": LAYERS, **FEWER.get(kind, {}), **more})
    split = tuple(uniform(config.get_text_config(decoder=True).num_hidden_layers, stages))
    shape = json.dumps(config.to_dict(), sort_keys=True)
    return stage_check.difference(shape, attention, dtype, kept, split, trains)


@pytest.mark.parametrize("kind", kinds(PASS))
def test_a_model_that_only_passes_hidden_states_on_is_cut(kind: str) -> None:
    assert difference(kind) is None


@pytest.mark.parametrize("kind", kinds(REFUSED))
def test_a_model_that_does_more_is_not_and_what_it_does_is_said(kind: str) -> None:
    reported = difference(kind)
    assert reported is not None
    assert reported.startswith(REFUSED[kind])


@pytest.mark.parametrize(
    ("attention", "kept", "dtype"),
    [
        *(("eager", "none", "bfloat16"), ("sdpa", "none", "float32"), ("eager", "dynamic", "float32")),
        *(("sdpa", "dynamic", "bfloat16"), ("sdpa", "static", "bfloat16"), ("eager", "static", "float32")),
    ],
)
def test_it_is_proven_as_the_run_will_be(attention: str, kept: str, dtype: str) -> None:
    assert difference("qwen3", attention, dtype, kept) is None
    assert difference("xglm", attention, dtype, kept) is not None


def test_a_scale_in_its_config_decides_whether_granite_is_cut() -> None:
    assert difference("granite") is None
    assert (
        difference("granite", logits_scaling=2.0, residual_multiplier=0.5) is None
    )  # by the layers and the head
    reported = difference("granite", embedding_multiplier=1.5)
    assert reported is not None
    assert reported.startswith("its own forward changes the hidden states before stage 1's first layer")


def test_a_loss_that_needs_every_stage_is_refused() -> None:
    assert difference("mixtral") is None
    reported = difference("mixtral", kept="none", output_router_logits=True)
    assert reported is not None
    assert reported.startswith("the loss of its stages differ from those of the whole by")


@pytest.mark.parametrize(
    ("kind", "key"), [("phi", "embd_pdrop"), ("gpt_neox", "hidden_dropout"), ("codegen", "embd_pdrop")]
)
def test_dropout_beside_the_layers_is_refused_in_training_alone(kind: str, key: str) -> None:
    dropped: Any = {key: 0.1}
    assert difference(kind, kept="none", **dropped) is None
    assert difference(kind, kept="none", trains=True) is None
    reported = difference(kind, kept="none", trains=True, **dropped)
    assert reported is not None
    assert reported.startswith(
        "in training its own forward changes the hidden states before stage 1's layers"
    )


def test_dropout_within_the_layers_is_not() -> None:
    assert difference("falcon", kept="none", trains=True, hidden_dropout=0.1, attention_dropout=0.1) is None


class Gated(LlamaForCausalLM):
    """Its gate is shut until it is trained."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.gate = torch.nn.Parameter(torch.zeros(()))
        self.model.register_forward_pre_hook(_shifted, with_kwargs=True)


def _shifted(module: Any, args: Any, kwargs: Any) -> Any:
    embedded = kwargs.pop("inputs_embeds", None)
    if embedded is None:
        embedded = module.embed_tokens(kwargs.pop("input_ids"))
    return args, {**kwargs, "input_ids": None, "inputs_embeds": embedded * (1 + module.gate)}


def test_what_does_nothing_before_it_is_trained_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AutoModelForCausalLM._model_mapping._extra_content, LlamaConfig, Gated)
    reported = difference("llama", rms_norm_eps=1e-4)  # not a config that was proven before
    assert reported is not None
    assert reported.startswith("its own forward changes the hidden states before stage 1's first layer")


@pytest.mark.parametrize(("words", "reason"), [(["model=gpt2"], "fails where it is given hidden states")])
def test_a_refusal_names_the_model_and_what_would_work(words: list[str], reason: str) -> None:
    around = ["world=rehearsed", "world.size=2", "precision=bf16", "model.attention=sdpa"]
    settings = load(compose(["mode=train", "pipeline.stages=2", *around, *words]))
    with pytest.raises(Refusal) as refused:
        stage_check.prove(Plan.of(settings))
    sentence = str(refused.value)
    assert sentence.startswith("pipeline.stages=2: gpt2 cannot be cut into stages: ")
    assert reason in sentence
    assert sentence.endswith("; use pipeline.stages=1")
