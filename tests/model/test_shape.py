"""A model's config is what was asked for, all of it; what cannot be a model is refused by its key."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from harness.config import compose
from harness.config.load import load
from harness.config.rules import widths
from harness.config.settings import Model, Refusal
from harness.model import init_weights, shape
from harness.model.loader import model_config

MOE = "model.config.model_type=qwen3_moe"


def refusal(*words: str) -> str:
    """Why no model is made of `words`."""
    with pytest.raises(Refusal) as refused:
        built(*words)
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence


def built(*words: str) -> Model:
    requested = load(compose.compose(words)).model
    init_weights.outline(model_config(requested), torch.float32)
    return requested


WHOLE, SOME = "should be a whole number, 0 or more", "should be a whole number, 1 or more"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("model.config.intermediate_size=-1", SOME),
        ("model.config.intermediate_size=0", SOME),
        ("model.config.vocab_size=0", SOME),
        ("model.config.vocab_size=large", SOME),
        ("model.config.hidden_size=1.5", SOME),
        ("model.config.hidden_size=true", SOME),
        ("model.config.num_hidden_layers=nan", SOME),
        ("model.config.num_key_value_heads=0", SOME),
        ("+model.config.head_dim=-8", SOME),
        ("model=gpt2 model.config.n_layer=0", SOME),
        (f"{MOE} +model.config.num_experts=-4", WHOLE),
        (f"{MOE} +model.config.num_experts_per_tok=0", SOME),
        (f"{MOE} +model.config.num_experts=4 +model.config.num_experts_per_tok=8", "there are num_experts=4"),
        (
            f"{MOE} +model.config.moe_intermediate_size=0",
            "with it model.layers.0.mlp.experts",
        ),
        (
            "model=gpt2 +model.config.n_inner=0",
            "with it transformer.h.0.mlp.c_fc.weight would have no elements",
        ),
        ("+model.config.head_dim=7", "rotary positions turn pairs, and a head has 7"),
        ("model.config.hidden_size=12", "rotary positions turn pairs, and a head has 3"),
        ("model.config.rope_parameters.rope_theta=0", "should be a number above 0"),
        ("model.config.rms_norm_eps=-1e-5", "should be a number, 0 or more"),
        ("+model.config.attention_dropout=-8", "should be a number from 0 to 1"),
        (
            "model.config.num_key_value_heads=[1]",
            "transformers refuses it: Field 'num_key_value_heads' with value",
        ),
        (
            "model.config.rope_parameters={rope_type:llama3,rope_theta:10000.0}",
            "model.config.rope_parameters={rope_type:llama3,rope_theta:10000.0}: transformers refuses it: ",
        ),
        (
            "model.config.model_type=mamba2",
            "model.config.model_type=mamba2: transformers refuses it: Inconsistent configuration: hidden_size * ",
        ),
        ("model.config.hidden_size=null", "transformers refuses it: Field 'hidden_size' expected int"),
        ("+model.config.use_cache=7", "transformers refuses it: Field 'use_cache' expected bool, got int"),
        ("+model.config.hidden_act=silo", "transformers has none of that name; it has silu"),
        ("+model.config.hiden_size=64", "llama has no such key; did you mean hidden_size?"),
        ("+model.config.sliding_window=64", "llama has no such key; leave it out"),
        (
            "model=gpt2 +model.config.num_key_value_heads=2",
            "gpt2 has no such key; did you mean num_attention_he",
        ),
        ("+model.config.rope_theta=7", "rope_parameters.rope_theta=10000.0 comes first; set that"),
        ("+model.config.dtype=float16", "llama has no such key; use precision="),
        ("+model.config.temperature=0.5", "llama has no such key; use generation.temperature="),
        ("model.config.model_type=null", 'there is no model_type; say which it is, as "llama"'),
        ("model.config.model_type=lama", "this transformers has no model_type lama; did you mean llama?"),
        (
            "model.config.model_type=t5",
            "t5 is not a causal language model in transformers; give one, as llama",
        ),
    ],
)
def test_what_makes_no_model_is_refused_by_its_key(words: str, expected: str) -> None:
    *_, last = words.split(" ")
    assert refusal(*words.split(" ")).startswith(f"{last.lstrip('+').partition('=')[0]}=")
    assert expected in refusal(*words.split(" "))


def test_what_transformers_only_warns_of_is_refused() -> None:
    said = refusal("+model.config.rope_parameters.fator=2")
    assert said.startswith("model.config.rope_parameters={rope_type:default,rope_theta:10000.0,fator:2}: ")
    assert "Unrecognized keys" in said
    assert "'fator'" in said


@pytest.mark.parametrize(
    "more",
    [
        "mlp_bias=true",
        "head_dim=32",
        "pretraining_tp=2",
    ],
)
def test_a_key_that_the_type_of_model_has_is_taken(more: str) -> None:
    built(f"+model.config.{more}")


def test_what_a_page_says_to_another_type_of_model_is_left_out_and_told() -> None:
    assert shape.left_out(built("model=tiny")) is None
    assert shape.left_out(built("model.config.model_type=mistral")) is None
    reported = shape.left_out(built("model.config.model_type=gpt2"))
    assert reported is not None
    assert reported.startswith(
        "gpt2: it has no intermediate_size, num_key_value_heads, rms_norm_eps, rope_parameters "
    )
    assert reported.endswith("of model=tiny; left out")


@pytest.mark.parametrize("name", compose.groups()["model"])
def test_of_every_page_all_counts(name: str) -> None:
    assert shape.left_out(load(compose.compose([f"model={name}"])).model) is None


def test_no_type_of_causal_model_has_a_config_that_is_refused() -> None:
    for kind in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"gemma4_assistant", "glm4_moe"}:  # no heads' width
        widths.check(AutoConfig.for_model(kind).to_dict(), f"{kind}: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": None}, ': its config.json: there is no model_type; say which it is, as "llama"'),
        (
            {"model_type": "lama"},
            ": its config.json: this transformers has no model_type lama; did you mean llama?",
        ),
        (
            {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}},
            ": its model is custom code (auto_map), which is never run; give one of a type that transformers has",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            ": its weights are a LlamaForSequenceClassification's, which predicts no tokens; give a causal",
        ),
        ({"model_type": "vit"}, ": vit is not a causal language model in transformers; give one"),
        ({"hidden_size": -4}, "/config.json: hidden_size=-4: should be a whole number, 1 or more"),
    ],
)
def test_a_checkpoint_of_no_causal_model_is_refused_with_what_to_do(
    change: dict[str, object], expected: str, tmp_path: Path
) -> None:
    whole = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=4).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(Refusal) as refused:
        model_config(Model(path=str(tmp_path)))
    assert expected in str(refused.value)


def test_the_shape_of_a_classifier_is_taken_where_its_weights_are_not(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", architectures=["LlamaForSequenceClassification"]).save_pretrained(tmp_path)
    assert model_config(Model(path=str(tmp_path), random=True)).model_type == "llama"


def test_a_config_that_begins_with_a_mark_is_refused_with_what_to_do(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    with pytest.raises(Refusal, match=r"its config.json cannot be read: .*; save it as UTF-8 without a mark"):
        load(compose.compose([f"model.path={tmp_path}"]))
