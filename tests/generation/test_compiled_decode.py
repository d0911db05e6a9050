"""A compiled decoding step gives the eager one's tokens, keeps its cache where it is, and its books close."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from harness.config.settings import Generation, Refusal
from harness.config.strategy import merged
from harness.generation.batch import Requests
from harness.generation.compiled_decode import Compiled, compiled, options
from harness.generation.compiled_decode import program as program_of
from harness.generation.decode import Generated, generate
from harness.ledger import Ledger
from harness.rehearsal.course import uncompiled

PROMPTS = [[5, 6, 7], [9] * 6]
NEW = 8
LENGTH = 6 + NEW + 3  # more than these batches need
OFF = Ledger(mode="off")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def program(model: Any) -> Compiled:
    return Compiled(model, LENGTH, OFF)


def run(model: Any, program: Compiled | None, ledger: Ledger = OFF, prompts: Any = PROMPTS) -> Generated:
    requests = Requests(prompts, [NEW] * len(prompts))
    return generate(model, requests, cache=program or "static", ledger=ledger)


def test_tokens_are_those_of_the_eager_step_for_every_batch(model: Any, program: Compiled) -> None:
    first = run(model, program)
    assert first.compile_seconds > 0
    places = [layer.keys.data_ptr() for layer in program.cache.layers]  # type: ignore[union-attr]
    for prompts in (PROMPTS, [[1, 2], [3, 4]], [[8] * 9, [7]]):
        assert run(model, program, prompts=prompts).tokens == run(model, None, prompts=prompts).tokens
    assert first.tokens == run(model, None).tokens
    assert [layer.keys.data_ptr() for layer in program.cache.layers] == places  # type: ignore[union-attr]
    assert len({token for row in first.tokens for token in row}) > 3  # else anything would agree


def test_what_looks_at_tokens_is_outside_of_the_program(model: Any, program: Compiled) -> None:
    fields = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "eos_token_id": 3}
    strategy = merged(Generation(), fields)
    requests = Requests(PROMPTS, [NEW] * 2)
    result = [
        generate(model, requests, strategy, cache=each, ledger=OFF).tokens for each in (program, "static")
    ]
    assert result[0] == result[1] != run(model, None).tokens


def test_the_books_close_and_the_program_is_the_same_under_an_exact_ledger(
    model: Any, program: Compiled
) -> None:
    expected = run(model, None).tokens
    run(model, program)
    with Ledger(model=model, cache=program.cache) as ledger:
        program.ledger = ledger
        torch._dynamo.utils.counters.clear()
        assert run(model, program, ledger).tokens == expected
    program.ledger = OFF
    assert not torch._dynamo.utils.counters["stats"]  # nothing was compiled for its sake
    assert ledger.allocator.unattributed == 0
    assert ledger.peak.categories["kv_cache"] == 2 * 2 * LENGTH * 16 * 4 + 8  # and a counter


@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2], [3, 4]]])
def test_a_compiled_decode_counts_as_the_operators_of_its_eager_step(model: Any, prompts: Any) -> None:
    actual = []
    for make_program in (program_of, uncompiled):
        with Ledger(model=model) as ledger:
            run(model, Compiled(model, LENGTH, ledger, make_program), ledger, prompts)
        actual.append({phase.where.phase: phase.work for phase in ledger.phases})
    assert actual[0]["decode"] == actual[1]["decode"]
    assert actual[0]["decode"].forward_calls == NEW - 1  # type: ignore[union-attr]


def test_the_cache_is_told_as_reserved_filled_and_live(model: Any, program: Compiled) -> None:
    kv = run(model, program).kv
    assert kv is not None
    token = 2 * 16 * 4
    assert kv.reserved == 2 * LENGTH * token + 8
    assert kv.filled == 2 * (6 + NEW - 1) * token
    assert kv.live == (3 + 6 + 2 * (NEW - 1)) * token


def test_a_rehearsed_step_is_the_same_step_and_is_not_compiled(model: Any) -> None:
    torch._dynamo.utils.counters.clear()
    rehearsed = Compiled(model, LENGTH, OFF, uncompiled)
    assert run(model, rehearsed).tokens == run(model, None).tokens
    assert not torch._dynamo.utils.counters["stats"]


def test_what_cannot_be_compiled_whole_is_refused_with_the_reason() -> None:
    def step(tokens: torch.Tensor, *_: Any) -> torch.Tensor:
        Path("/").exists()  # no part of any program
        return tokens if tokens.sum().item() > 0 else tokens + 1

    given = torch.zeros(1, 1)
    with pytest.raises(Refusal, match=r"generation\.compile=true: the decoding step cannot be compiled"):
        compiled(step, options(torch.device("cpu"), False))(given, given, given, None)


@pytest.mark.parametrize("window", [4, 64])
def test_a_window_takes_a_program_while_it_fills_and_another_when_it_is_full(window: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MistralConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=window,
            initializer_range=0.2,
        )
    ).eval()
    model.requires_grad_(False)
    program = Compiled(model, LENGTH, OFF, uncompiled)
    torch._dynamo.utils.counters.clear()
    read = {**options(torch.device("cpu"), True), "options": None, "backend": "eager"}  # and not built
    step = compiled(program._forward, read)
    program._program = lambda *arguments: step(*arguments[:4])
    assert run(model, program).tokens == run(model, None).tokens
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
