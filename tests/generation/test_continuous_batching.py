"""Continuous batching: each request gets what it gets alone, places and pages go from one to the next, books close."""

import json
from collections.abc import Sequence
from math import ceil
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from harness.config.compose import compose
from harness.config.load import Generation, Refusal, load
from harness.config.strategy import merged
from harness.data.prompts import Prompt
from harness.generation import cache_check, decode
from harness.generation.batch import Requests
from harness.generation.continuous_batching import Continued, generate
from harness.generation.paged_cache import layers, limits_of
from harness.ledger import Ledger
from harness.model.kv_cache import layer_bytes_per_token

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,  # random weights that do not say one word again and again
    "tie_word_embeddings": False,
}
SHAPES: dict[str, PretrainedConfig] = {
    "grouped": LlamaConfig(num_key_value_heads=2, **SIZES),
    "qwen3": Qwen3Config(num_key_value_heads=2, head_dim=32, **SIZES),
    "gpt2": GPT2Config(**{name: value for name, value in SIZES.items() if name != "intermediate_size"}),
    "windowed": MistralConfig(num_key_value_heads=2, sliding_window=6, **SIZES),
    "some windowed": Gemma3TextConfig(
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **{**SIZES, "num_hidden_layers": 3},
    ),
}
KINDS_OF_PAGES = [
    pytest.param(shape, marks=[] if shape in ("grouped", "some windowed") else [pytest.mark.exhaustive])
    for shape in SHAPES
]
"""Pages of one kind of layer and of two; the other shapes are told apart by their tokens."""
PROMPTS = [[5, 6, 7], [9] * 11, [20, 21, 22, 23, 24, 25], [300], [1, 2, 3, 4], [7, 7], [8] * 17, [30, 31]]
MOST = [5, 20, 3, 9, 12, 1, 8, 17]
PLACES, PAGE = 3, 4


def build(shape: str = "grouped", attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SHAPES[shape], attn_implementation=attention).eval()


def settings_with(**options: Any) -> Generation:
    return Generation(
        **{"batch": PLACES, "page_size": PAGE, "cache": "paged", "batching": "continuous", **options}
    )


def requests(prompts: Sequence[list[int]], most: Sequence[int]) -> list[Prompt]:
    return [Prompt("", prompt, new, "", "", "") for prompt, new in zip(prompts, most, strict=True)]


def continued(model: Any, ledger: Ledger | None = None, eos: Sequence[int] = (), **options: Any) -> Continued:
    within = limits_of(settings_with(**options), model.config, model.dtype, requests(PROMPTS, MOST))
    strategy = merged(Generation(), {"eos_token_id": list(eos)})
    asked_for = Requests(PROMPTS, MOST, range(len(PROMPTS)))
    return generate(model, asked_for, strategy, limits=within, ledger=ledger or Ledger(mode="off"))


def alone(model: Any) -> list[list[int]]:
    """transformers' `generate`, a request at a time."""
    made = []
    for prompt, new in zip(PROMPTS, MOST, strict=True):
        row = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)[0]
        made.append(row[len(prompt) :].tolist())
    return made


class Watch:
    """What each forward of a model is given, and which pages are taken then."""

    def __init__(self, model: Any) -> None:
        self.rows: list[int] = []  # tokens in the row
        self.tables: list[list[int]] = []  # by forward, the pages of each request
        self.cache: Any = None
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module: Any, args: Any, given: dict[str, Any]) -> None:
        self.cache = given["cache"]
        tables = self.cache.cache_allocators["full_attention"].block_table
        taken = [page for table in tables.values() for page in table]
        assert len(set(taken)) == len(taken)  # no page is two requests'
        self.tables.append([len(table) for table in tables.values()])
        self.rows.append(given["input_ids"].shape[1])


@pytest.mark.parametrize(
    ("shape", "attention"),
    [
        *((shape, "sdpa") for shape in SHAPES),
        ("some windowed", "eager"),
        *(
            pytest.param(shape, "eager", marks=pytest.mark.exhaustive)
            for shape in SHAPES
            if shape != "some windowed"
        ),
    ],
)
def test_each_request_gets_what_it_gets_alone(shape: str, attention: str) -> None:
    model = build(shape, attention)
    expected = alone(model)
    assert len({token for row in expected for token in row}) > 5  # else anything would agree
    assert continued(model).tokens == expected
    assert model.config._attn_implementation == attention
    assert alone(model) == expected  # the model is as before


@pytest.mark.parametrize("shape", KINDS_OF_PAGES)
def test_prompts_that_are_shown_in_parts_change_no_token(shape: str) -> None:
    model = build(shape)
    watch = [] if "window" in shape else [Watch(model)]
    assert continued(model, batch_tokens=5).tokens == alone(build(shape))
    assert all(max(each.rows) == 5 for each in watch)


def test_tokens_are_those_of_static_batching() -> None:
    model = build()
    for first in range(0, len(PROMPTS), PLACES):
        mine = slice(first, first + PLACES)
        made = decode.generate(model, Requests(PROMPTS[mine], MOST[mine]), ledger=Ledger(mode="off"))
        assert continued(model).tokens[mine] == made.tokens


def test_a_request_ends_after_its_own_end_token_and_keeps_it() -> None:
    model = build()
    rows = alone(model)
    ends = [rows[1][4], rows[4][7]]
    cut = [row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))] for row in rows]
    assert cut != rows
    assert continued(model, eos=ends).tokens == cut


def test_requests_enter_as_others_leave_and_never_more_than_there_are_places() -> None:
    model = build()
    watch = Watch(model)
    made = continued(model)
    taken = [len(tables) for tables in watch.tables]
    assert max(taken) == PLACES
    assert taken[: max(MOST) - 1] == [PLACES] * (max(MOST) - 1)  # others take the places beside the longest
    static = sum(max(MOST[first : first + PLACES]) for first in range(0, len(MOST), PLACES))
    assert made.paged is not None
    assert made.paged.forwards == len(watch.rows) < static
    assert made.paged.tokens == sum(watch.rows) == sum(map(len, PROMPTS)) + sum(MOST) - len(MOST)


def test_a_request_has_the_pages_that_its_tokens_need_and_gives_all_back() -> None:
    model = build()
    watch = Watch(model)
    made = continued(model, batch=1)
    needed = [
        [ceil(length / PAGE)]
        for prompt, new in zip(PROMPTS, MOST, strict=True)
        for length in range(len(prompt), len(prompt) + new)
    ]
    assert watch.tables == needed
    assert made.paged is not None
    assert made.paged.pages == made.paged.pages_used == ceil((11 + 20 - 1) / PAGE)
    watch.cache.pool.try_to_free_sectors()
    assert watch.cache.pool.num_free_sectors == watch.cache.num_sectors


@pytest.mark.parametrize("shape", KINDS_OF_PAGES)
def test_pages_for_the_longest_request_in_every_place_are_always_enough(shape: str) -> None:
    made = continued(build(shape), batch=5)
    assert made.paged is not None
    assert made.paged.evicted == 0
    assert made.paged.pages_used <= made.paged.pages


def test_with_fewer_pages_requests_give_theirs_up_and_lose_nothing() -> None:
    model = build()
    watch = Watch(model)
    made = continued(model, pages=8)
    assert made.tokens == alone(build())
    assert made.paged is not None
    assert made.paged.evicted > 0
    assert made.paged.pages == made.paged.pages_used == 8
    assert max(map(sum, watch.tables)) == 8
    assert made.paged.tokens == sum(watch.rows) > sum(map(len, PROMPTS)) + sum(MOST) - len(MOST)
    assert [len(timestamps) for timestamps in made.timestamps] == MOST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_are_counted_at_the_moment_of_most_pages(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    watch = Watch(model)
    made = continued(model, batch=2)
    token = model.config.num_hidden_layers * layer_bytes_per_token(model.config, dtype)
    assert made.kv is not None
    assert made.paged is not None
    assert (
        made.kv.reserved == (made.paged.pages + 2) * PAGE * token
    )  # transformers keeps two pages for nobody
    assert (
        made.kv.filled == max(map(sum, watch.tables)) * PAGE * token == made.paged.pages_used * PAGE * token
    )
    assert made.kv.live == made.kv.positions * token
    assert made.kv.filled - 2 * (PAGE - 1) * token <= made.kv.live <= made.kv.filled


def test_a_layer_with_a_window_holds_no_more_than_its_window() -> None:
    model = build("windowed")
    made = continued(model, batch=1)
    token = model.config.num_hidden_layers * layer_bytes_per_token(model.config, torch.float32)
    assert made.kv is not None
    assert (made.kv.filled, made.kv.live) == (2 * PAGE * token, 6 * token)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_books_close_and_every_page_is_a_kv_cache(attention: str) -> None:
    model = build(attention=attention)
    with Ledger(model=model) as ledger:
        made = continued(model, ledger)
    assert made.kv is not None
    assert ledger.allocator.unattributed == 0
    assert ledger.categories["kv_cache"].peak == made.kv.reserved
    assert ledger.categories["kv_cache"].end == ledger.categories["inputs"].end == 0
    assert ledger.peak.categories["inputs"]
    assert (
        ledger.peak.bytes
        == ledger.allocator.peak
        == sum(each or 0 for each in ledger.peak.categories.values())
    )
    assert ledger.peak.categories["kv_cache"] == made.kv.reserved


def test_a_step_is_as_many_requests_ended_as_there_are_places() -> None:
    model = build()
    with Ledger(model=model, steps=2) as ledger:
        made = continued(model, ledger)
        assert not ledger.exact
    assert len(made.loads) == ceil(len(PROMPTS) / PLACES)
    places = {(phase.where.step, phase.where.phase) for phase in ledger.phases}
    assert {(0, "prefill"), (0, "decode"), (0, "data"), (1, "decode"), (2, "decode")} <= places
    exact = {phase.where.step for phase in ledger.phases if phase.peak is not None}
    assert exact == {0, 1}


def test_every_token_has_its_moment_and_every_request_is_in_one_load() -> None:
    made = continued(build())
    assert [len(timestamps) for timestamps in made.timestamps] == [len(tokens) for tokens in made.tokens]
    assert all(timestamps == sorted(timestamps) for timestamps in made.timestamps)
    assert all(
        entered < timestamps[0] for entered, timestamps in zip(made.entered, made.timestamps, strict=True)
    )
    assert made.timestamps[3][0] >= min(
        timestamps[-1] for timestamps in made.timestamps[:PLACES]
    )  # it waited for a place
    assert sorted(number for load in made.loads for number in load.first) == list(range(len(PROMPTS)))
    assert sum(load.new_tokens for load in made.loads) == sum(MOST)
    assert sum(load.prompt_tokens for load in made.loads) == sum(map(len, PROMPTS))
    timings = [load.timing(made) for load in made.loads]
    assert all(first > 0 for timing in timings for first in timing.first_seconds)
    assert sum(timing.computed for timing in timings) == sum(MOST)


def test_room_is_for_the_longest_request_in_every_place_unless_it_is_said() -> None:
    def made(**options: Any) -> Any:
        return limits_of(settings_with(**options), SHAPES["grouped"], torch.float32, requests(PROMPTS, MOST))

    longest = 11 + 20 - 1
    assert made() == (PLACES, PLACES * ceil(longest / PAGE), PAGE, PLACES * 17)
    assert made(batch=100).max_num_seqs == len(PROMPTS)
    assert made(pages=20, batch_tokens=9, page_size=16) == (PLACES, 20, 16, 9)
    many = limits_of(
        settings_with(batch=64), SHAPES["grouped"], torch.float32, requests([[1] * 60] * 64, [2] * 64)
    )
    assert many.max_num_batched_tokens == 512
    wide = limits_of(
        settings_with(batch=64), SHAPES["grouped"], torch.float32, requests([[1] * 900] * 64, [2] * 64)
    )
    assert wide.max_num_batched_tokens == 900 + 63


@pytest.mark.parametrize("shape", KINDS_OF_PAGES)
def test_pages_too_few_for_one_request_are_refused_with_the_number_that_would_do(shape: str) -> None:
    model = build(shape)
    with pytest.raises(Refusal) as refused:
        continued(model, pages=1)
    reported = str(refused.value)
    assert reported.startswith("generation.pages=1: the longest request has 30 tokens; use ")
    least = int(reported.rpartition("use ")[2].split()[0])
    with pytest.raises(Refusal):
        continued(model, pages=least - 1)
    made = continued(model, pages=least)
    assert made.tokens == alone(model)


@pytest.fixture
def narrow() -> Any:
    def difference(kind: str, attention: str = "eager") -> str | None:
        config = AutoConfig.for_model(kind, num_hidden_layers=3)
        return cache_check.difference(json.dumps(config.to_dict(), sort_keys=True), attention, "paged")

    return difference


@pytest.mark.parametrize(
    "kind",
    [
        *("gemma3_text", "gpt_oss"),
        *(
            pytest.param(kind, marks=pytest.mark.exhaustive)
            for kind in ("llama", "qwen2_moe", "gpt_neox", "cohere", "opt")
        ),
    ],
)
def test_a_model_that_is_the_same_in_pages_is_batched(narrow: Any, kind: str) -> None:
    assert narrow(kind) is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma2", "logits differ by up to "),  # a soft cap
        pytest.param(  # a bias by distance
            "bloom", "logits differ by up to ", marks=pytest.mark.exhaustive
        ),
        pytest.param(  # an attention of its own
            "gptj", "logits differ by up to ", marks=pytest.mark.exhaustive
        ),
        ("deepseek_v3", "there it fails (RuntimeError: "),  # latents
    ],
)
def test_a_model_that_is_not_is_refused_and_how_is_said(narrow: Any, kind: str, reason: str) -> None:
    reported = narrow(kind)
    assert reported is not None
    assert reported.startswith(reason)


@pytest.mark.parametrize("kind", ["mamba", "qwen3_next", "llama4_text"])
def test_a_layer_that_has_no_pages_is_refused_in_transformers_words(kind: str) -> None:
    with pytest.raises(
        Refusal, match=f"transformers' paged cache does not support a layer of {kind} \\(Invalid layer type: "
    ):
        layers(AutoConfig.for_model(kind, num_hidden_layers=4))


CONTINUOUS = ("generation.batching=continuous", "generation.cache=paged")


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (
            ["generation.cache=paged"],
            "generation.cache=paged: only continuous batching uses pages; add",
        ),
        (
            ["generation.batching=continuous"],
            "generation.batching=continuous: generation.cache=dynamic is for requests",
        ),
        (["generation.page_size=8"], "generation.page_size=8: static batching has none; add"),
        (["generation.pages=8"], "generation.pages=8: static batching has none; add"),
        (["generation.batch_tokens=8"], "generation.batch_tokens=8: static batching has none; add"),
        ([*CONTINUOUS, "generation.page_size=3"], "generation.page_size=3: "),
        (
            [*CONTINUOUS, "generation.batch_tokens=3"],
            "generation.batch_tokens=3: a forward has a token of each of",
        ),
        ([*CONTINUOUS, "pipeline.stages=2"], "pipeline.stages=2: continuous batching works on whole models"),
        (
            [*CONTINUOUS, "generation.tensor_parallel=2"],
            "generation.tensor_parallel=2: continuous batching works on whole models",
        ),
        ([*CONTINUOUS, "generation.compile=true"], "generation.compile=true: generation.cache=paged grows"),
    ],
)
def test_what_cannot_be_batched_so_is_refused_before_anything_is_made(
    words: list[str], reported: str
) -> None:
    with pytest.raises(Refusal) as refused:
        load(compose(["mode=infer", *words]))
    assert str(refused.value).startswith(reported)


def test_paged_and_continuous_go_together() -> None:
    loaded = load(compose(["mode=infer", *CONTINUOUS, "generation.batch_tokens=4"]))
    assert (loaded.generation.cache, loaded.generation.batching) == ("paged", "continuous")
