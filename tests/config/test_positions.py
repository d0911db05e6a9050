"""The longest sequence of a model is what its config comes to, whichever attribute says it, with torch and without."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.config.rules import positions
from harness.config.rules.positions import limit
from harness.config.rules.sources import read
from harness.config.settings import Refusal, Settings, Train


def rope(kind: str, factor: float, before: int | None = None, **more: Any) -> dict[str, Any]:
    reported = {} if before is None else {"original_max_position_embeddings": before}
    return {"rope_type": kind, "factor": factor, **reported, **more}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
LONG = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
CONFIGS: list[tuple[str, dict[str, Any], int | None]] = [
    ("llama", {"max_position_embeddings": 4096}, 4096),
    ("gpt2", {"n_positions": 1024, "n_ctx": 1024}, 1024),
    ("codegen", {"n_positions": 2048, "n_ctx": 512}, 2048),
    ("mpt", {"max_seq_len": 65536}, 65536),
    ("dbrx", {"max_seq_len": 32768}, 32768),
    ("whisper", {"max_target_positions": 448, "max_source_positions": 1500}, 448),
    ("kimi_linear", {"model_max_length": 1048576}, 1048576),
    ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
    ("gemma3", {"text_config": {"model_type": "gemma3_text", "max_position_embeddings": 8192}}, 8192),
    # Qwen2.5 and Qwen3 as their pages say to stretch them
    ("qwen2", {"max_position_embeddings": 32768, "rope_scaling": rope("yarn", 4.0, 32768)}, 131072),
    ("qwen2", {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
    ("qwen3", {"max_position_embeddings": 40960, "rope_parameters": rope("yarn", 4.0, 32768)}, 131072),
    # what is stretched already: DeepSeek-V3, gpt-oss, Llama 3.1, Phi-3, Gemma 3
    ("deepseek_v3", {"max_position_embeddings": 163840, "rope_scaling": rope("yarn", 40, 4096)}, 163840),
    ("gpt_oss", {"max_position_embeddings": 131072, "rope_scaling": rope("yarn", 32.0, 4096)}, 131072),
    (
        "llama",
        {"max_position_embeddings": 131072, "rope_scaling": rope("llama3", 8.0, 8192, **LLAMA3)},
        131072,
    ),
    (
        "phi3",
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", **LONG},
        },
        131072,
    ),
    ("gemma3_text", {"max_position_embeddings": 131072, "rope_scaling": rope("linear", 8.0)}, 131072),
    # a linear rope and a dynamic one say their factor alone
    ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
    ("llama", {"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
    # no positions, or none that end
    ("bloom", {"seq_length": 2048, "n_layer": 2}, None),
    ("falcon", {"alibi": True, "max_position_embeddings": 2048}, None),
    ("falcon", {"alibi": False, "max_position_embeddings": 2048}, 2048),
    ("mamba", {"num_hidden_layers": 2}, None),
    ("rwkv", {"context_length": 1024}, None),
    ("recurrent_gemma", {}, None),
    ("xlnet", {}, None),
]


@pytest.mark.parametrize(("kind", "config", "expected"), CONFIGS)
def test_the_limit_is_what_the_config_comes_to_as_it_is_written_and_as_it_is_read(
    kind: str, config: dict[str, Any], expected: int | None
) -> None:
    written = {"model_type": kind, **config}
    for shape in (written, AutoConfig.for_model(**written).to_dict()):
        actual = limit(shape)
        assert (None if actual is None else actual.tokens) == expected


def test_a_model_is_not_held_to_what_a_group_says_for_others() -> None:
    of_others = {"model_type": "mpt", "max_position_embeddings": 1024}
    assert limit(of_others) is None
    assert limit({**of_others, "max_seq_len": 32}) == (32, "max_seq_len")


@pytest.mark.parametrize("value", [None, -1, 0, True, "many"])
def test_a_number_that_counts_nothing_is_no_limit(value: object) -> None:
    assert limit({"model_type": "any", "max_position_embeddings": value}) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"max_seq_len": 8}, "max_seq_len"),
        (
            {"n_positions": 8, "rope_scaling": rope("linear", 2.5)},
            "n_positions=8 x factor=2.5 of rope_scaling",
        ),
        (
            {"max_position_embeddings": 8, "rope_parameters": {"full_attention": rope("yarn", 4.0, 4)}},
            "original_max_position_embeddings=4 x factor=4 of rope_parameters",
        ),
    ],
)
def test_what_says_the_limit_is_named(config: dict[str, Any], said: str) -> None:
    actual = limit(config)
    assert actual is not None
    assert actual.source == said


NARROW = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
TABLES = {
    "gpt2": {"n_positions": 12},
    "mpt": {"max_seq_len": 12},
    "opt": {"max_position_embeddings": 12, "word_embed_proj_dim": 32, "ffn_dim": 32},
    "roberta": {"max_position_embeddings": 14, "is_decoder": True},
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_model_with_a_table_takes_as_many_and_no_more(kind: str) -> None:
    config = AutoConfig.for_model(kind, **NARROW, **TABLES[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    actual = limit(config.to_dict())
    assert actual is not None
    assert actual.tokens == 12
    model(torch.ones(1, 12, dtype=torch.int64) * 5)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, 13, dtype=torch.int64) * 5)


def test_training_is_held_to_what_the_config_leaves_out_too() -> None:
    left_out = AutoConfig.for_model("mpt").to_dict()
    settings = Settings(train=Train(sequence=2049))
    positions.check(settings, {"model_type": "mpt"})  # a config.json without it says nothing
    with pytest.raises(Refusal, match=r"train\.sequence=2049: the model allows 2048 tokens \(max_seq_len\)"):
        positions.check(settings, left_out)


@pytest.mark.parametrize(
    ("kind", "config", "layers"),
    [
        ("gpt2", {"n_layer": 3}, 3),
        ("mpt", {"n_layers": 3}, 3),
        ("whisper", {"encoder_layers": 2, "decoder_layers": 3}, 3),
        ("gemma3", {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 3}}, 3),
    ],
)
def test_layers_are_counted_under_whichever_name_a_config_has_for_them(
    kind: str, config: dict[str, Any], layers: int
) -> None:
    result = AutoConfig.for_model(kind, **config)
    assert read(config, "num_hidden_layers")[1] == read(result.to_dict(), "num_hidden_layers")[1] == layers
    assert result.get_text_config(decoder=True).num_hidden_layers == layers
