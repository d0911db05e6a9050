"""What a cache holds is what the formula says, and what it reserves beyond that is told apart."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from harness.model.kv_cache import kv_bytes, kv_bytes_per_token, layer_bytes_per_token, make

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SHAPES: dict[str, PretrainedConfig] = {
    "grouped": LlamaConfig(num_key_value_heads=2, **SIZES),
    "every head": LlamaConfig(num_key_value_heads=4, **SIZES),
    "one head": LlamaConfig(num_key_value_heads=1, **SIZES),
    "own head width": Qwen3Config(num_key_value_heads=2, head_dim=24, **SIZES),
    "gpt2": GPT2Config(
        bos_token_id=0, eos_token_id=0, **{k: v for k, v in SIZES.items() if k != "intermediate_size"}
    ),
}
BATCH, SHOWN, ROOM = 2, 7, 12


def show(config: PretrainedConfig, kind: str, dtype: torch.dtype, tokens: int = SHOWN) -> Any:
    """A cache of `kind` after a model of this shape was shown BATCH x `tokens`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    cache = make(kind, config, ROOM)
    with torch.no_grad():
        model(torch.ones(BATCH, tokens, dtype=torch.int64), past_key_values=cache)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_dynamic_cache_holds_what_the_formula_says(shape: str, dtype: torch.dtype) -> None:
    config = SHAPES[shape]
    token = kv_bytes_per_token(config, dtype)
    assert token is not None
    measured = kv_bytes(show(config, "dynamic", dtype))
    assert measured.reserved == measured.filled == measured.live == BATCH * SHOWN * token
    assert measured.per_token == kv_bytes_per_token(config, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_static_cache_reserves_its_whole_length_and_fills_what_was_shown(
    shape: str, dtype: torch.dtype
) -> None:
    config = SHAPES[shape]
    measured = kv_bytes(show(config, "static", dtype))
    layers = config.num_hidden_layers
    per_token, counters = layers * layer_bytes_per_token(config, dtype), 8 * layers
    assert measured.reserved == BATCH * ROOM * per_token + counters
    assert measured.filled == measured.live == BATCH * SHOWN * per_token


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            OPTConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40),
            800 * 1024,
            id="OPT-13B in the PagedAttention paper",
        ),
        pytest.param(
            LlamaConfig(
                hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
            ),
            320 * 1024,
            id="LLaMA-2-70B",
        ),
    ],
)
def test_the_formula_gives_published_figures(config: PretrainedConfig, expected: int) -> None:
    assert kv_bytes_per_token(config, torch.bfloat16) == expected


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padding_is_filled_but_not_live(kind: str) -> None:
    config = SHAPES["grouped"]
    measured = kv_bytes(show(config, kind, torch.float32), rows=[SHOWN, 3])
    per_token = config.num_hidden_layers * layer_bytes_per_token(config, torch.float32)
    assert measured.filled == BATCH * SHOWN * per_token
    assert measured.live == (SHOWN + 3) * per_token


def test_keys_and_values_that_are_views_reserve_all_that_they_pin() -> None:
    cache = show(SHAPES["every head"], "dynamic", torch.float32)
    plain = kv_bytes(cache)
    for layer in cache.layers:
        _, keys, values = torch.empty(3, *layer.keys.shape).unbind()
        layer.keys, layer.values = keys.copy_(layer.keys), values.copy_(layer.values)
    pinned = kv_bytes(cache)
    assert 2 * pinned.reserved == 3 * plain.reserved
    assert (pinned.filled, pinned.live) == (plain.filled, plain.live)
    assert (plain.pinned, pinned.pinned) == (0, plain.reserved // 2)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_sliding_window_keeps_less_than_was_shown(kind: str) -> None:
    config = MistralConfig(num_key_value_heads=2, sliding_window=4, **SIZES)
    measured = kv_bytes(show(config, kind, torch.float32), rows=[SHOWN, 2])
    kept = {"dynamic": 3, "static": 4}[kind]  # beside the newest, or with it
    per_token = config.num_hidden_layers * layer_bytes_per_token(config, torch.float32)
    assert kv_bytes_per_token(config, torch.float32) is None  # no token takes so much for good
    assert measured.positions == BATCH * SHOWN
    assert measured.filled == BATCH * kept * per_token
    assert measured.live == (kept + 2) * per_token


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_shown_nothing_has_no_figure_per_token(kind: str) -> None:
    cache = make(kind, SHAPES["grouped"], ROOM)
    assert cache is not None
    measured = kv_bytes(cache)
    assert (measured.filled, measured.live, measured.per_token) == (0, 0, None)


def test_no_cache_is_none_and_an_unknown_kind_is_an_error() -> None:
    assert make("none", SHAPES["grouped"], ROOM) is None
    with pytest.raises(ValueError, match=r"'paged'.*dynamic, static, quantized, offloaded, none"):
        make("paged", SHAPES["grouped"], ROOM)
