"""Every kind of cache and of layer: tokens are transformers' own, and each figure is what is held, to the byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, QuantizedCache

from harness.config.compose import compose
from harness.config.load import Refusal, load
from harness.generation.batch import Requests
from harness.generation.decode import Generated, generate
from harness.ledger import Ledger
from harness.model.kv_cache import (
    attention_flops_per_position,
    check_bits,
    check_kind,
    kv_bytes,
    kv_bytes_per_token,
    make,
)
from harness.model.plan import Plan
from harness.rehearsal.all_ranks import rehearse

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "mistral": {**BASE, "sliding_window": 8},
    "gemma3_text": {**BASE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_next": {**BASE, **EXPERTS},
    "falcon_h1": {**BASE, **MAMBA},
    "deepseek_v3": {**BASE, **LATENT},
}
ONE_HEAD = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "bos_token_id",
    "eos_token_id",
)
PROMPTS = [[5, 6, 7], [9] * 11, [20, 21, 22, 23, 24, 25]]
WIDTH, NEW = 11, 12


def build(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPES[kind], **more})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def ours(
    model: Any, cache: str, prompts: Any = PROMPTS, new: int = NEW, bits: int = 8, ledger: Any = None
) -> Generated:
    requests = Requests(prompts, [new] * len(prompts))
    return generate(model, requests, cache=cache, bits=bits, ledger=ledger or Ledger(mode="off"))


def theirs(model: Any, prompts: Any = PROMPTS, new: int = NEW, **cache: Any) -> list[list[int]]:
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    fixed = {"do_sample": False, "pad_token_id": 0, "disable_compile": True, "max_new_tokens": new}
    return model.generate(tokens, attention_mask=mask, **fixed, **cache)[:, width:].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", SHAPES)
def test_models_of_every_kind_of_layer_give_transformers_own_tokens(kind: str, cache: str) -> None:
    model = build(kind)
    result = ours(model, cache)
    assert result.tokens == theirs(model, cache_implementation=cache)
    kv = result.kv
    assert kv is not None
    assert kv.live <= kv.filled <= kv.reserved - kv.state - kv.pinned


def test_a_window_of_a_long_prompt_pins_all_of_it_until_the_next_token() -> None:
    model = build("mistral")
    token = 2 * 2 * 2 * 16 * 4
    after_prompt = ours(model, "dynamic", [[9] * 40], new=1).kv
    assert after_prompt is not None
    assert after_prompt.filled == 7 * token
    assert after_prompt.pinned == 33 * token  # a window's keys are a view of all 40
    later = ours(model, "dynamic", [[9] * 40], new=2).kv
    assert later is not None
    assert (later.filled, later.pinned) == (7 * token, token)


def test_linear_attention_keeps_as_much_however_long_a_sequence_is() -> None:
    model = build("qwen3_next")
    short, long = (ours(model, "dynamic", [[9] * length]).kv for length in (4, 40))
    assert short is not None
    assert long is not None
    assert short.state == long.state > 0
    assert long.filled > short.filled
    assert long.reserved == long.filled + long.state


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "llama"])
def test_the_formula_is_not_told_of_models_that_it_does_not_describe(kind: str) -> None:
    assert kv_bytes_per_token(build(kind).config, torch.float32) is None


@pytest.mark.parametrize("kind", ["mllama", "openai-gpt", "xlnet", "mamba", "dots3_note_text"])
def test_nor_of_one_that_caches_other_things_or_nothing(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    assert kv_bytes_per_token(config, torch.float32) is None
    assert attention_flops_per_position(config) is None


def test_a_model_with_a_state_of_another_kind_is_refused_a_cache() -> None:
    config = AutoConfig.for_model("mamba2", num_hidden_layers=2)
    with pytest.raises(
        Refusal, match=r"generation\.cache=dynamic: mamba2 keeps a state .* use generation\.cache=none"
    ):
        check_kind("dynamic", config)
    check_kind("none", config)


@pytest.mark.usefixtures("quanto")
@pytest.mark.parametrize(
    ("bits", "backend"), [(8, {"backend": "fp8"}), (4, {"backend": "quanto", "nbits": 4})]
)
def test_a_quantized_cache_gives_transformers_own_tokens(bits: int, backend: dict[str, Any]) -> None:
    model, prompts = build("llama", head_dim=64), [[5, 6, 7] * 40, [9] * 100]
    expected = theirs(model, prompts, 40, past_key_values=QuantizedCache(config=model.config, **backend))
    result = ours(model, "quantized", prompts, 40, bits)
    assert result.tokens == expected
    assert result.kv is not None
    plain = ours(model, "dynamic", prompts, 40).kv
    assert plain is not None
    assert result.kv.positions == plain.positions
    assert result.kv.reserved < plain.reserved / 2  # a quarter, and what is not quantized yet


def test_eight_bits_take_a_byte_an_element_and_a_scale_a_tensor() -> None:
    model = build("llama")
    kv = ours(model, "quantized").kv
    assert kv is not None
    elements = len(PROMPTS) * (WIDTH + NEW - 1) * 2 * 16
    assert kv.reserved == 2 * 2 * (elements + 4)  # two layers, keys and values, each with a scale in fp32
    assert kv.filled == kv.reserved
    shown = sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW - 1)
    assert kv.live // 4 == kv.filled // 4 * shown // (len(PROMPTS) * (WIDTH + NEW - 1))


def test_four_bits_take_half_a_byte_an_element_and_a_scale_and_a_shift_for_sixty_four() -> None:
    model = build("llama", head_dim=64)
    cache = make("quantized", model.config, 0, bits=4)
    with torch.no_grad():
        model(torch.ones(2, 64, dtype=torch.int64), past_key_values=cache)
    assert cache is not None
    measured = kv_bytes(cache)
    elements = 2 * 64 * 2 * 64
    assert measured.reserved == 2 * 2 * (elements // 2 + elements // 64 * (4 + 4))
    assert measured.filled == measured.live == measured.reserved


@pytest.mark.parametrize("bits", [8, 4])
def test_the_books_close_around_a_quantized_cache(bits: int) -> None:
    model = build("llama", torch.bfloat16, head_dim=64)
    ours(model, "quantized", bits=bits)  # what is made once is there
    with Ledger(model=model) as ledger:
        kv = ours(model, "quantized", bits=bits, ledger=ledger).kv
    assert ledger.allocator.unattributed == 0
    assert kv is not None
    ends = [phase.categories["kv_cache"] for phase in ledger.phases if phase.where.phase == "decode"]
    assert ends == [ledger.categories["kv_cache"].peak]
    assert ledger.categories["kv_cache"].peak >= kv.reserved  # type: ignore[operator]


@pytest.mark.parametrize(("bits", "ranks"), [(4, 1), (2, 1), (4, 2)])
def test_groups_that_would_end_within_a_token_are_refused(bits: int, ranks: int) -> None:
    config = build("llama", head_dim=16 * ranks).config
    with pytest.raises(Refusal, match=r"in groups of 64, and a token's keys have 32 elements"):
        check_kind("quantized", config, bits, ranks=ranks)
    check_kind("quantized", config, 8, ranks=ranks)
    check_kind("quantized", build("llama", head_dim=32 * ranks).config, bits, ranks=ranks)


def test_what_is_larger_than_all_in_a_prompt_is_the_largest_that_eight_bits_hold() -> None:
    cache = make("quantized", build("llama").config, 0)
    assert cache is not None
    prompt = torch.ones(1, 2, 3, 16)
    cache.update(prompt, prompt, 0)
    keys, values = cache.update(100 * prompt[:, :, :1], -100 * prompt[:, :, :1], 0)
    assert (keys.amax(), values.amin()) == (1, -1)


def test_a_torch_that_makes_large_numbers_none_is_refused_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.model.kv_cache.saturates", lambda device: False)
    cpu = torch.device("cpu")
    with pytest.raises(
        Refusal, match=r"generation\.cache_bits=8: .* use torch 2\.13, or generation\.cache_bits=4"
    ):
        check_bits(8, cpu)
    check_bits(4, cpu)


def test_a_quantized_cache_is_refused_where_layers_do_not_attend_to_all() -> None:
    with pytest.raises(Refusal, match=r"generation\.cache=quantized: transformers has none for mistral"):
        check_kind("quantized", build("mistral").config)


def rehearsed(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    requested = [
        "mode=infer",
        "world=rehearsed",
        "world.size=1",
        "ledger.steps=1",
        "generation.stop_at_eos=false",
        *("precision=bf16", "model.attention=sdpa"),
        *words,
    ]
    ranks, done = rehearse(Plan.of(load(compose(requested))))
    return ranks[0].tree(), done.tree()["inference"]


def test_llama2_70b_at_batch_8_and_4096_tokens_is_10_gib_exactly() -> None:
    _, inference = rehearsed(
        *("model=llama2-70b", "model.config.max_position_embeddings=4097", "hardware=cpu"),
        *("generation.cache=static", "generation.batch=8", "generation.count=8"),
        *("generation.prompt_length=4095", "generation.max_new_tokens=2"),
    )
    counters = 8 * 80
    assert inference["kv_reserved"] - counters == inference["kv_filled"] == inference["kv_live"] == 10 * 2**30
    assert inference["kv_bytes_per_token"] == inference["kv_bytes_per_token_measured"] == 320 * 1024


def test_an_offloaded_cache_is_in_the_hosts_memory_but_for_the_layers_in_use() -> None:
    words = (
        "model=small",
        "hardware=h100-sxm",
        "generation.prompt_length=128",
        "generation.max_new_tokens=4",
    )
    kept, on_device = rehearsed(*words, "generation.cache=dynamic")
    rank, offloaded = rehearsed(*words, "generation.cache=offloaded")
    assert on_device["kv_host"] == 0
    assert offloaded["kv_reserved"] == on_device["kv_reserved"]
    layer = offloaded["kv_reserved"] // 8
    assert offloaded["kv_host"] == 7 * layer  # the next one is on its way
    most = rank["categories"]["kv_cache"]["peak"]
    assert 2 * layer <= most < kept["categories"]["kv_cache"]["peak"] / 2
    assert rank["categories"]["kv_cache"]["end"] == 0  # nothing outlives its batch


def test_stages_may_offload_their_caches() -> None:
    words = ("model=tiny", "hardware=h100-sxm", "generation.batch=4", "generation.count=4")
    staged = (*words, "world.size=2", "pipeline.stages=2", "generation.max_new_tokens=4")
    _, whole = rehearsed(*words, "generation.max_new_tokens=4")
    rank, offloaded = rehearsed(*staged, "generation.cache=offloaded")
    assert offloaded["kv_reserved"] == whole["kv_reserved"]
    assert offloaded["kv_host"] == whole["kv_reserved"] // 2  # of two layers of a stage one is on its way
    assert rank["categories"]["kv_cache"]["end"] == 0


def test_an_offloaded_cache_is_refused_where_the_model_is_in_the_hosts_memory() -> None:
    with pytest.raises(Refusal, match=r"generation\.cache=offloaded: it would move to the host's memory"):
        rehearsed("model=tiny", "hardware=auto", "generation.cache=offloaded")


def test_packages_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    with pytest.raises(Refusal, match=r"generation\.cache_bits=4: 4 bits need optimum-quanto; pip install"):
        check_kind("quantized", build("llama").config, 4)


def test_bits_that_nothing_here_can_unpack_are_refused_before_the_model_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from optimum.quanto.library.extensions import cpp, extension

    def load(**_: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr(cpp.ext, "_lib", None)
    monkeypatch.setattr(extension, "load", load)
    with pytest.raises(
        Refusal, match=r"cache_bits=4: .*could not here \(Ninja .*use generation\.cache_bits=8"
    ):
        check_bits(4, torch.device("cpu"))
    check_bits(8, torch.device("cpu"))
    check_kind("quantized", build("llama", head_dim=64).config, 4)  # a rehearsal compiles nothing


@pytest.mark.parametrize("kind", ["falcon", "gpt_bigcode"])
def test_one_head_of_keys_for_all_queries_is_counted_as_one(kind: str) -> None:
    config = AutoConfig.for_model(kind, **{name: value for name, value in BASE.items() if name in ONE_HEAD})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    kv = ours(model, "dynamic").kv
    assert kv is not None
    assert kv.per_token == kv_bytes_per_token(config, torch.float32) == 2 * 2 * 16 * 4


def test_keys_that_are_values_too_are_counted_once() -> None:
    cache = make("dynamic", build("llama").config, 0)
    assert cache is not None
    both = torch.zeros(2, 1, 8, 16)
    for number in range(2):
        cache.update(both, both, number)
        cache.layers[number].values = cache.layers[number].keys
    measured = kv_bytes(cache)
    assert (measured.reserved, measured.filled, measured.pinned) == (2 * both.nbytes, 2 * both.nbytes, 0)


@pytest.mark.parametrize(
    ("cache", "kind"),
    [
        *(("static", "mistral"), ("dynamic", "qwen3_next")),
        *(
            pytest.param(*other, marks=pytest.mark.exhaustive)
            for other in (("dynamic", "mistral"), ("static", "qwen3_next"))
        ),
    ],
)
def test_a_rehearsal_of_the_ends_is_that_of_every_token(
    kind: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoConfig.for_model(kind, **{**SHAPES[kind], "vocab_size": 384, "sliding_window": 40}).save_pretrained(
        tmp_path
    )
    words = (
        *(f"model.path={tmp_path}", "model.random=true", f"generation.cache={cache}", "hardware=cpu"),
        *("generation.prompt_length=20", "generation.max_new_tokens=50", "generation.count=2"),
    )
    ends = rehearsed(*words)
    monkeypatch.setattr("harness.rehearsal.cache_growth.can_advance", lambda cache: False)
    assert json.dumps(rehearsed(*words)) == json.dumps(ends)


def test_figures_of_a_rehearsal_are_numbers_that_json_knows(tmp_path: Path) -> None:
    _, inference = rehearsed(
        "model=tiny", "hardware=cpu", "generation.cache=quantized", "generation.max_new_tokens=4"
    )
    assert json.loads(json.dumps(inference))["kv_reserved"] > 0
