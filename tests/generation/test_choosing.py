"""Each request gets the tokens that transformers' `generate` gives its prompt alone, whatever its generation config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from harness.config.compose import compose
from harness.config.load import Generation, load
from harness.config.strategy import Strategy, merged
from harness.data.prompts import Prompt
from harness.generation import continuous_batching, infer
from harness.generation.batch import Requests
from harness.generation.choosing import draws, processors
from harness.generation.decode import generate
from harness.generation.paged_cache import limits_of
from harness.ledger import Ledger
from harness.model.plan import Plan
from harness.record.record_file import Output, rank_record
from harness.record.results import Results
from harness.rehearsal.one_rank import rehearse
from harness.runtime.world import World

WORDS = 48
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
PROMPTS = [[5, 6, 7, 5, 6], [9] * 11, [32], [20, 21, 20, 21, 20], [0, 0, 3]]
MOST = [6, 9, 12, 9, 12]
ENDS = (11, 43, 38)
"""Tokens that this model says early after some of these prompts, and late."""

FIELDS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "rewarded": {"repetition_penalty": 0.6},
    "encoder repetition": {"encoder_repetition_penalty": 6.0},
    "ngrams": {"no_repeat_ngram_size": 2},
    "long ngrams": {"no_repeat_ngram_size": 4},
    "prompt's ngrams": {
        "encoder_no_repeat_ngram_size": 2,
        "sequence_bias": [[[5], 4.0], [[9], 4.0], [[20], 4.0]],
    },
    "bias": {"sequence_bias": [[[20], -9.0], [[21, 20], 30.0], [[9, 9, 9, 7], 30.0]]},
    "bad words": {"bad_words_ids": [[28], [9, 16], [32, 32, 32]]},
    "least in all": {"min_length": 9},
    "least new": {"min_new_tokens": 5},
    "both": {"min_length": 3, "min_new_tokens": 7},
    "forced first": {"forced_bos_token_id": 30},
    "forced last": {"forced_eos_token_id": 31},
    "forced last of two": {"forced_eos_token_id": [31, 32]},
    "decay": {"exponential_decay_length_penalty": [2, 1.9]},
    "suppressed": {"suppress_tokens": [28, 40, 32]},
    "suppressed at first": {"begin_suppress_tokens": list(range(0, WORDS, 2))},
    "at first after one": {"begin_suppress_tokens": list(range(0, WORDS, 2)), "forced_bos_token_id": 30},
    "no numbers": {"remove_invalid_values": True, "suppress_tokens": [16]},
    "renormalized": {"renormalize_logits": True, "repetition_penalty": 1.3},
    "several": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5]],
        "min_new_tokens": 4,
    },
}

SAMPLED: dict[str, dict[str, Any]] = {
    "plainly": {},
    "sharply": {"temperature": 0.4},
    "of few": {"top_k": 3},
    "of the likeliest": {"top_p": 0.5},
    "of all but the unlikely": {"min_p": 0.2},
    "typically": {"typical_p": 0.3},
    "above epsilon": {"epsilon_cutoff": 0.05},
    "above eta": {"eta_cutoff": 0.3},
    "by entropy": {"top_h": 0.4},
    "renormalized": {"renormalize_logits": True, "temperature": 2.0},
    "penalized": {"repetition_penalty": 1.5, "top_k": 8, "temperature": 0.7},
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval().requires_grad_(False)


def strategy_of(fields: dict[str, Any], *eos: int, seed: int = 0) -> Strategy:
    return merged(Generation(), {"eos_token_id": list(eos), **fields}, seed=seed)


REQUESTS = Requests(PROMPTS, MOST, range(len(PROMPTS)))


def ours(model: Any, strategy: Strategy, requests: Requests = REQUESTS, **options: Any) -> list[list[int]]:
    return generate(model, requests, strategy, ledger=Ledger(mode="off"), **options).tokens


def paged(model: Any, strategy: Strategy, **options: Any) -> list[list[int]]:
    requested = Generation(batch=3, page_size=4, cache="paged", batching="continuous", **options)
    given = [Prompt("", prompt, new, "", "", "") for prompt, new in zip(PROMPTS, MOST, strict=True)]
    within = limits_of(requested, model.config, model.dtype, given)
    return continuous_batching.generate(
        model, REQUESTS, strategy, limits=within, ledger=Ledger(mode="off")
    ).tokens


def theirs(model: Any, fields: dict[str, Any], *eos: int) -> list[list[int]]:
    """transformers' `generate`, a prompt at a time."""
    result = []
    for prompt, new in zip(PROMPTS, MOST, strict=True):
        options = {
            "max_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": list(eos) or None,
        }
        given = torch.tensor([prompt])
        row = model.generate(given, attention_mask=torch.ones_like(given), **{**options, **fields})[0]
        result.append(row[len(prompt) :].tolist())
    return result


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_tokens_are_those_of_each_prompt_alone(model: Any, fields: dict[str, Any]) -> None:
    expected = theirs(model, fields, *ENDS)
    assert expected != theirs(model, {}, *ENDS)  # it changes something
    assert ours(model, strategy_of(fields, *ENDS)) == expected


@pytest.mark.parametrize(
    "name", ["several", "bias", "prompt's ngrams", "both", "forced last", "at first after one", "decay"]
)
def test_tokens_are_the_same_in_pages(model: Any, name: str) -> None:
    fields = FIELDS[name]
    assert paged(model, strategy_of(fields, *ENDS)) == theirs(model, fields, *ENDS)


def test_a_request_that_gives_up_its_pages_is_chosen_for_as_if_it_had_not(model: Any) -> None:
    fields = {"do_sample": True, **FIELDS["several"]}
    few = paged(model, strategy_of(fields, *ENDS), pages=7, batch_tokens=5)
    assert few == ours(model, strategy_of(fields, *ENDS))


@pytest.mark.parametrize("cache", ["static", "none"])
def test_the_cache_changes_nothing_of_it(model: Any, cache: str) -> None:
    fields = FIELDS["several"]
    expected = theirs(model, fields, *ENDS)
    assert ours(model, strategy_of(fields, *ENDS), cache=cache) == expected


def alone(number: int) -> Requests:
    return Requests([PROMPTS[number]], [MOST[number]], [number])


@pytest.mark.parametrize("fields", SAMPLED.values(), ids=SAMPLED)
def test_draws_depend_on_no_neighbour_and_no_way_of_batching(model: Any, fields: dict[str, Any]) -> None:
    strategy = strategy_of({"do_sample": True, **fields}, *ENDS, seed=1)
    together = ours(model, strategy)
    assert together == [ours(model, strategy, alone(number))[0] for number in range(len(PROMPTS))]
    assert together == paged(model, strategy)
    assert together != ours(model, strategy_of({"do_sample": True, **fields}, *ENDS, seed=2))


@pytest.mark.parametrize("fields", SAMPLED.values(), ids=SAMPLED)
def test_what_is_drawn_from_is_what_transformers_draws_from(model: Any, fields: dict[str, Any]) -> None:
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, given: Any, out: Any) -> None:
        seen.append(out.logits[:, -1].float())

    strategy = strategy_of({"do_sample": True, **fields})
    prompt = torch.tensor([PROMPTS[0]])
    hook = model.register_forward_hook(see, with_kwargs=True)
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1,
        do_sample=True,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **{"top_k": 0, **fields},
    )
    hook.remove()
    scores = processors(strategy, model.config, prompt, 1)(prompt, seen[0])
    assert scores.equal(result.scores[0])
    uniform = draws(0, [0], 1, prompt.device)
    drawn = ours(model, strategy, Requests([PROMPTS[0]], [1], [0]))[0][0]
    up_to = scores.softmax(-1).cumsum(-1)[0]
    before = up_to[drawn - 1] if drawn else torch.zeros(())
    assert before <= uniform[0, 0] * up_to[-1] < up_to[drawn]


SMALL = (
    *(
        "mode=infer",
        "hardware=cpu",
        "model.attention=sdpa",
        "generation.batch=3",
        "generation.config.eos_token_id=383",
    ),
    *("model.config.num_hidden_layers=1", "model.config.hidden_size=32", "model.config.intermediate_size=48"),
    *("model.config.num_attention_heads=2", "generation.config.suppress_tokens=[383]"),
)
EVERY = (
    *("repetition_penalty=1.3", "encoder_repetition_penalty=1.2", "no_repeat_ngram_size=3"),
    *(
        "bad_words_ids=[[28],[9,16],[3,3,3,3,3,3]]",
        "sequence_bias=[[[20],-9.0],[[21,20],3.0]]",
        "min_new_tokens=5",
    ),
    *("forced_bos_token_id=30", "begin_suppress_tokens=[3,4]", "exponential_decay_length_penalty=[7,1.1]"),
    *("remove_invalid_values=true", "renormalize_logits=true", "forced_eos_token_id=382"),
)
DRAWN = (
    *("generation.sample=true", "generation.temperature=0.8", "generation.top_k=40", "generation.top_p=0.9"),
    *(f"generation.config.{each}" for each in ("min_p=0.01", "top_h=0.9", "typical_p=0.9")),
    *(f"generation.config.{each}" for each in ("epsilon_cutoff=0.001", "eta_cutoff=0.001")),
)
PAGED = ("generation.batching=continuous", "generation.cache=paged", "generation.page_size=4")


@pytest.mark.parametrize(
    "words", [("precision=fp32",), (*PAGED, "generation.pages=9", "precision=bf16")], ids=["static", "paged"]
)
def test_a_rehearsal_holds_and_does_what_the_run_does(words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    lines = (
        {"prompt": "x" * prompt, "max_new_tokens": most}
        for prompt, most in [(3, 12), (9, 3), (1, 22), (9, 3)]
    )
    file.write_text("\n".join(map(json.dumps, lines)))
    every = (f"generation.config.{each}" for each in EVERY)
    requested = (*SMALL, *DRAWN, *every, *words, f"generation.workload={file}")
    settings, done = load(compose(requested)), Results()
    with Ledger(steps=settings.ledger.steps, device="cpu") as ledger:
        out = Output(tmp_path, lambda line: None, done, lambda: None)
        infer.run(Plan.of(settings), World(0, 1, 0, torch.device("cpu")), ledger, out)
    assert ledger.allocator.unattributed == 0
    real = rank_record(ledger, 0, 0, 0)
    rehearsed, reported = rehearse(Plan.of(load(compose([*requested, "world=rehearsed", "world.size=1"]))), 0)
    assert rehearsed.categories == real.categories
    assert rehearsed.phases == [phase for phase in real.phases if phase.step < settings.ledger.steps]
    assert reported.inference is not None
    assert done.inference is not None
    assert reported.inference.generation_config == done.inference.generation_config
