"""Generation gives transformers' own tokens, asks for no more than it needs, and stays in its buffers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from harness.config.load import Generation
from harness.config.strategy import LIKELIEST, Strategy, merged
from harness.generation.batch import Batch, Requests, pad_left
from harness.generation.choosing import drawn, draws, greedy
from harness.generation.decode import decode_n_tokens, generate, prefill, shown_to
from harness.generation.timestamps import Marks
from harness.ledger import Ledger
from harness.model.kv_cache import layer_bytes_per_token, make

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
    "every head": LlamaConfig(num_key_value_heads=4, **SIZES),
    "qwen3": Qwen3Config(num_key_value_heads=2, head_dim=32, **SIZES),
    "gpt2": GPT2Config(**{name: value for name, value in SIZES.items() if name != "intermediate_size"}),
}
CACHES = ["dynamic", "static", "none"]
PADDED = [[5, 6, 7], [9] * 11, [20, 21, 22, 23, 24, 25], [300]]
EVEN = [[5, 6, 7], [40, 50, 60]]
NEW = 20
CPU = torch.device("cpu")


def build(shape: str = "grouped", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype, attn_implementation=attention)
    return model.eval()


def requests_of(prompts: Sequence[Sequence[int]], most: int = NEW, first: int = 0) -> Requests:
    return Requests(prompts, [most] * len(prompts), range(first, first + len(prompts)))


def ending(*eos: int) -> Strategy:
    return merged(Generation(), {"eos_token_id": list(eos)})


def sampled(**options: Any) -> Strategy:
    return merged(Generation(sample=True, **options), {})


def ours(
    model: Any, prompts: Sequence[Sequence[int]], strategy: Strategy = LIKELIEST, **options: Any
) -> list[list[int]]:
    return generate(model, requests_of(prompts), strategy, ledger=Ledger(mode="off"), **options).tokens


def theirs(model: Any, prompts: Sequence[list[int]], cache: str, **options: Any) -> list[list[int]]:
    """transformers' `generate` on the same batch, padded by hand."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    kind = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **kind, **options}
    result = model.generate(tokens, attention_mask=mask, **options)
    return result[:, width:].tolist()  # type: ignore[no-any-return]


def watch(model: Any, see: Callable[[dict[str, Any], torch.Tensor], None]) -> None:
    """Call `see` with every forward's arguments and logits."""
    model.register_forward_hook(lambda _, args, given, out: see(given, out.logits), with_kwargs=True)


@pytest.mark.parametrize("prompts", [PADDED, EVEN], ids=["padded", "even"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_transformers(
    shape: str, attention: str, dtype: torch.dtype, cache: str, prompts: list[list[int]]
) -> None:
    model = build(shape, attention, dtype)
    expected = theirs(model, prompts, cache)
    assert len({token for row in expected for token in row}) > 5  # else anything would agree
    assert ours(model, prompts, cache=cache) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_no_prompts_tokens(shape: str) -> None:
    model = build(shape)
    alone = [ours(model, [prompt])[0] for prompt in PADDED]
    assert ours(model, PADDED) == alone


@pytest.mark.parametrize("cache", CACHES)
def test_a_sequence_ends_after_any_of_the_end_tokens_as_in_transformers(cache: str) -> None:
    model = build()
    free = theirs(model, PADDED, cache)
    ends = [free[0][4], free[1][9]]
    expected = theirs(model, PADDED, cache, eos_token_id=ends)
    stopped = ours(model, PADDED, ending(*ends), cache=cache)
    assert len({len(row) for row in stopped}) > 1  # they end in different places
    for row, whole, unstopped in zip(stopped, expected, free, strict=True):
        assert row == whole[: len(row)] == unstopped[: len(row)]
        assert len(row) == NEW or row[-1] in ends
        assert not set(row[:-1]) & set(ends)


def test_generation_stops_when_every_sequence_has_ended() -> None:
    model, forwards = build(), []
    first = ours(model, EVEN)
    watch(model, lambda given, logits: forwards.append(1))
    assert ours(model, EVEN, ending(*(row[2] for row in first))) == [row[:3] for row in first]
    assert len(forwards) == 3


def test_without_end_tokens_every_sequence_fills_its_room() -> None:
    assert {len(row) for row in ours(build(), PADDED)} == {NEW}


@pytest.mark.parametrize("cache", CACHES)
def test_one_new_token_is_prefill_alone(cache: str) -> None:
    model = build()
    one = generate(model, requests_of(PADDED, 1), cache=cache, ledger=Ledger(mode="off")).tokens
    assert one == [row[:1] for row in theirs(model, PADDED, cache)]


@pytest.mark.parametrize("cache", CACHES)
def test_the_model_is_shown_each_token_once_and_asked_for_last_logits_only(cache: str) -> None:
    model = build()
    shown: list[int] = []
    requested: set[int] = set()

    def see(given: dict[str, Any], logits: torch.Tensor) -> None:
        shown.append(given["input_ids"].shape[1])
        requested.add(logits.shape[1])

    watch(model, see)
    ours(model, PADDED, cache=cache)
    width = max(map(len, PADDED))
    again = [width + number if cache == "none" else 1 for number in range(1, NEW)]
    assert shown == [width, *again]
    assert requested == {1}


@torch.no_grad()
def test_tokens_are_chosen_in_fp32() -> None:
    seen = set()

    def choose(logits: torch.Tensor, number: int) -> torch.Tensor:
        seen.add(logits.dtype)
        return greedy(logits, number)

    prefill(shown_to(build(dtype=torch.bfloat16), None), pad_left(requests_of(PADDED), (), CPU), choose)
    assert seen == {torch.float32}


class Waits(TorchDispatchMode):
    """Counts the times that a tensor's value is read by the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("cache", "prompts"), [("dynamic", EVEN), ("static", EVEN), ("static", PADDED)])
@torch.no_grad()
def test_decoding_reads_no_value_back(cache: str, prompts: list[list[int]]) -> None:
    model = build()
    batch, measured = pad_left(requests_of(prompts), (), CPU), make(cache, model.config, 11 + NEW)
    show = shown_to(model, measured)
    prefill(show, batch, greedy)
    with Waits() as waits:
        decode_n_tokens(show, batch, rest(batch), measured is not None, greedy, Marks(CPU))
    assert waits.count == 0


def rest(batch: Batch) -> range:
    return range(batch.width + 1, batch.tokens.shape[1])


def places(cache: Any) -> list[int]:
    return [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def test_a_static_cache_stays_where_it_is() -> None:
    model = build()
    batch, measured = pad_left(requests_of(PADDED), (), CPU), make("static", model.config, 11 + NEW)
    show = shown_to(model, measured)
    prefill(show, batch, greedy)
    before = places(measured)
    decode_n_tokens(show, batch, rest(batch), True, greedy, Marks(CPU))
    assert places(measured) == before != []


def test_prompts_are_padded_on_the_left_and_positions_count_real_tokens() -> None:
    batch = pad_left(requests_of([[7, 8, 9], [5]], 2), (), CPU)
    assert batch.tokens.tolist() == [[7, 8, 9, 0, 0], [0, 0, 5, 0, 0]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]


@pytest.mark.parametrize("cache", CACHES)
def test_a_sequence_gets_as_many_tokens_as_it_asked_for(cache: str) -> None:
    model, most = build(), [3, NEW, 1, 7]
    whole = ours(model, PADDED, cache=cache)
    result = generate(model, Requests(PADDED, most), cache=cache, ledger=Ledger(mode="off"))
    assert result.tokens == [row[:limit] for row, limit in zip(whole, most, strict=True)]
    assert [len(timestamps) for timestamps in result.timestamps] == most
    assert result.computed == len(PADDED) * NEW  # all wait for the last


def test_a_batch_ends_when_each_has_ended_or_has_all_it_asked_for() -> None:
    model = build()
    (long, _), most = ours(model, EVEN), [NEW, 4]
    end = long[8]
    assert end not in long[:8]
    result = generate(model, Requests(EVEN, most), ending(end), ledger=Ledger(mode="off"))
    assert [len(row) for row in result.tokens] == [9, 4]
    assert result.computed == 2 * 9


def test_moments_of_tokens_follow_each_other() -> None:
    result = generate(build(), requests_of(PADDED), ledger=Ledger(mode="off"))
    for timestamps in result.timestamps:
        assert list(timestamps) == sorted(timestamps)
        assert timestamps[0] >= result.began
    assert result.timestamps[0][-1] <= result.began + result.prefill_seconds + result.decode_seconds


def test_a_batch_without_padding_needs_no_mask() -> None:
    assert pad_left(requests_of(EVEN, 2), (), CPU).mask is None


THIRDS = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125]).log()
EVENLY = (torch.arange(1000) + 0.5) / 1000


def test_tokens_are_drawn_in_proportion_to_their_probability() -> None:
    actual = drawn(THIRDS.expand(1000, -1), EVENLY)
    assert actual.bincount(minlength=5).tolist() == [500, 0, 250, 125, 125]


@pytest.mark.parametrize(("number", "expected"), [(0.0, 1), (1 - 2**-24, 3)])
def test_the_ends_of_the_range_draw_no_impossible_token(number: float, expected: int) -> None:
    logits = torch.tensor([[-torch.inf, 3.0, 1.0, 2.0, -torch.inf]])
    assert drawn(logits, torch.tensor([number])).tolist() == [expected]


def test_a_sequences_draws_depend_on_the_seed_and_its_number_alone() -> None:
    together, apart = draws(1, [3, 8], NEW, CPU), draws(1, [8], NEW, CPU)
    assert together[1].equal(apart[0])
    assert not together[0].equal(together[1])
    assert not apart.equal(draws(2, [8], NEW, CPU))
    assert draws(1, [8], 3, CPU).equal(apart[:, :3])  # whatever room its batch has
    assert together.min() >= 0
    assert together.max() < 1


def test_a_sampled_text_does_not_depend_on_its_neighbours() -> None:
    model = build()
    strategy = sampled(temperature=0.8, top_k=50)
    together = ours(model, PADDED, strategy)
    for number, prompt in enumerate(PADDED):
        alone = generate(
            model, requests_of([prompt], first=number), strategy, ledger=Ledger(mode="off")
        ).tokens
        assert alone == [together[number]]
    assert together != ours(model, PADDED)


def test_only_the_likeliest_is_greedy() -> None:
    model = build()
    assert ours(model, PADDED, sampled(top_k=1)) == ours(model, PADDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", CACHES)
def test_the_books_of_generation_close_and_its_cache_is_named(cache: str, dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    with Ledger(model=model) as ledger:
        result = generate(model, requests_of(PADDED), cache=cache, ledger=ledger, step=0)
    assert ledger.allocator.unattributed == 0
    assert ledger.peak.bytes == ledger.allocator.peak
    assert ledger.peak.saved == 0
    assert ledger.categories["kv_cache"].end == 0
    if cache == "none":
        assert result.kv is None
        assert ledger.categories["kv_cache"].peak == 0
        return
    assert result.kv is not None
    layers, per_token = (
        model.config.num_hidden_layers,
        model.config.num_hidden_layers * layer_bytes_per_token(model.config, dtype),
    )
    shown = max(map(len, PADDED)) + NEW - 1
    if cache == "static":
        assert result.kv.reserved == len(PADDED) * shown * per_token + 8 * layers
        assert ledger.categories["kv_cache"].peak == result.kv.reserved
    else:
        assert result.kv.reserved == len(PADDED) * shown * per_token
        replaced = (
            len(PADDED) * (shown - 1) * per_token // (2 * layers)
        )  # the last layer's values, copied to grow
        assert ledger.categories["kv_cache"].peak == result.kv.reserved + replaced


def test_a_ledger_changes_no_token() -> None:
    model = build()
    with Ledger(model=model) as ledger:
        watched = generate(model, requests_of(PADDED), ledger=ledger).tokens
    assert watched == ours(model, PADDED)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_live_bytes_leave_out_padding_and_what_follows_an_end(cache: str) -> None:
    model = build()
    ends = [ours(model, PADDED)[0][4]]
    result = generate(model, requests_of(PADDED), ending(*ends), cache=cache, ledger=Ledger(mode="off"))
    per_token = model.config.num_hidden_layers * layer_bytes_per_token(model.config, torch.float32)
    kept = [
        len(prompt) + len(new) - (len(new) == NEW)  # the last of a full row is never shown to the model
        for prompt, new in zip(PADDED, result.tokens, strict=True)
    ]
    assert result.kv is not None
    assert result.kv.live == sum(kept) * per_token
    assert result.kv.filled == len(PADDED) * (max(map(len, PADDED)) + NEW - 1) * per_token
