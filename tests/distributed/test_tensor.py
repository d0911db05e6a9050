"""Ranks that share each layer generate what one alone would, hold their part of it, and close their books."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from tests.distributed.conftest import Launch, Warm, complete

PROMPTS = ["a", "longer", "the longest of them", "b", "cd"]
ASKED = (
    *("mode=infer", "precision=fp32", "model.config.num_hidden_layers=2", "generation.batch=3"),
    *("generation.max_new_tokens=8", "generation.stop_at_eos=false"),
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return f"generation.prompts={file}"


def tokens(directory: Path) -> list[list[int]]:
    return [json.loads(line)["tokens"] for line in (directory / "generations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_two_ranks_that_share_layers_generate_what_one_does(launch: Launch, prompts: str, cache: str) -> None:
    words = (*ASKED, prompts, f"generation.cache={cache}")
    alone = tokens(launch(*words))
    assert tokens(launch(*words, "generation.tensor_parallel=2")) == alone
    assert len({token for row in alone for token in row}) > 5  # else anything would agree


def test_replicas_of_ranks_that_share_layers_change_no_token(launch: Launch, prompts: str) -> None:
    alone = tokens(launch(*ASKED, prompts))
    shared = launch(*ASKED, prompts, "generation.tensor_parallel=2", ranks=4)
    assert tokens(shared) == alone
    record = complete(shared)
    assert [(rank["rank"], rank["share"]) for rank in record["ranks"]] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert record["inference"]["tensor_parallel"] == 2


def test_sampled_tokens_are_the_same_too(launch: Launch, prompts: str) -> None:
    words = (*ASKED, prompts, "generation.sample=true", "generation.config.repetition_penalty=1.3")
    assert tokens(launch(*words, "generation.tensor_parallel=2")) == tokens(launch(*words))


def test_a_checkpoint_is_shared_as_its_model_would_be(launch: Launch, prompts: str) -> None:
    trained = launch(
        *("mode=train", "train.steps=2", "train.sequence=32", "train.validate_every=0"),
        *("model.config.num_hidden_layers=2", "precision=fp32"),
    )
    words = (
        *("mode=infer", "precision=fp32", f"model.path={trained / 'checkpoint'}", prompts),
        *("generation.stop_at_eos=false", "generation.max_new_tokens=8"),
    )
    assert tokens(launch(*words, "generation.tensor_parallel=2")) == tokens(launch(*words))


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_head_that_a_checkpoint_names_otherwise_or_ties_to_a_whole_embedding_is_shared_too(
    launch: Launch, prompts: str, tmp_path: Path, tied: bool
) -> None:
    shape: dict[str, Any] = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96}
    config = GPTNeoXConfig(
        **shape, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=tied, eos_token_id=1
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    words = ("mode=infer", "precision=fp32", f"model.path={tmp_path}", prompts, "generation.max_new_tokens=8")
    assert tokens(launch(*words, "generation.tensor_parallel=2")) == tokens(launch(*words))


def test_each_rank_holds_its_part_of_parameters_and_cache_and_its_books_close(
    launch: Launch, prompts: str
) -> None:
    words = (*ASKED, prompts, "generation.cache=static")
    alone = complete(launch(*words))
    shared = complete(launch(*words, "generation.tensor_parallel=2"))
    counters, batches = 8 * 2, 2  # a layer counts its positions itself
    kv = shared["inference"]["kv_reserved"]
    assert kv == alone["inference"]["kv_reserved"] + counters
    for rank in shared["ranks"]:
        assert rank["allocator"]["unattributed"] == 0
        measured = rank["categories"]
        assert measured["kv_cache"]["peak"] == kv // batches
        whole = alone["ranks"][0]["categories"]["parameters"]["end"]
        norms_and_positions = 5 * 256 * 4 + 2 * 32 * 4
        assert measured["parameters"]["end"] == (whole - norms_and_positions) // 2 + norms_and_positions
        assert measured["communication"]["peak"] > 0


def test_tied_weights_are_cut_once_and_stay_tied(launch: Launch, prompts: str) -> None:
    words = (*ASKED, prompts, "model.config.tie_word_embeddings=true")
    alone, shared = launch(*words), launch(*words, "generation.tensor_parallel=2")
    assert tokens(shared) == tokens(alone)
    whole = complete(alone)["ranks"][0]["categories"]["parameters"]["end"]
    norms_and_positions = 5 * 256 * 4 + 2 * 32 * 4
    for rank in complete(shared)["ranks"]:
        measured = rank["categories"]["parameters"]["end"]
        assert measured == (whole - norms_and_positions) // 2 + norms_and_positions


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(  # norms of heads
            ("model.config.model_type=qwen3", "+model.config.head_dim=64"), marks=pytest.mark.exhaustive
        ),
        ("model.config.model_type=phi3",),  # weights packed in one
        ("model.config.model_type=mixtral", "+model.config.num_local_experts=4"),
    ],
    ids=lambda words: words[0].rpartition("=")[2],
)
def test_other_kinds_of_models_are_shared_by_their_own_plans(
    launch: Launch, prompts: str, kind: tuple[str, ...]
) -> None:
    words = (*ASKED, prompts, *kind)
    alone, shared = launch(*words), launch(*words, "generation.tensor_parallel=2")
    assert tokens(shared) == tokens(alone)
    assert [rank["allocator"]["unattributed"] for rank in complete(shared)["ranks"]] == [0, 0]


def test_no_rank_holds_a_whole_model_even_while_weights_are_drawn(launch: Launch, prompts: str) -> None:
    alone = complete(launch(*ASKED, prompts))
    whole = alone["ranks"][0]["categories"]["parameters"]["end"]
    for rank in complete(launch(*ASKED, prompts, "generation.tensor_parallel=2"))["ranks"]:
        (setup,) = [phase for phase in rank["phases"] if phase["phase"] == "setup"]
        assert setup["peak"] < whole


def test_ranks_that_share_layers_do_together_the_operations_of_one(launch: Launch, prompts: str) -> None:
    words = (*ASKED, prompts, "generation.batch=5")  # one alone has no other's prompts
    alone = complete(launch(*words, ranks=1))["ranks"]
    shared = complete(launch(*words, "generation.tensor_parallel=2"))["ranks"]
    for phase in ("prefill", "decode"):
        (one,), two = operations(alone, phase), operations(shared, phase)
        assert one == sum(two)
        assert two[0] == two[1] > 0


def operations(ranks: list[dict[str, Any]], phase: str) -> list[int]:
    return [sum(each["flops"] for each in rank["phases"] if each["phase"] == phase) for rank in ranks]


def test_figures_repeat_to_the_byte(launch: Launch, prompts: str) -> None:
    words = (*ASKED, prompts, "generation.tensor_parallel=2")
    first, second = (complete(launch(*words, again=again))["ranks"] for again in (0, 1))
    assert first == second


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (("model=gpt2",), "generation.tensor_parallel=2: transformers has no tensor-parallel plan for gpt2"),
        (  # its plan is of the head alone
            ("model.config.model_type=hunyuan_v1_dense", "+model.config.head_dim=64"),
            "generation.tensor_parallel=2: transformers has no tensor-parallel plan for hunyuan_v1_dense",
        ),
        (
            (
                "model.config.hidden_size=192",
                "model.config.num_attention_heads=3",
                "model.config.num_key_value_heads=3",
            ),
            "generation.tensor_parallel=2: must divide num_attention_heads=3 evenly; use 1",
        ),
        (
            ("model.config.num_key_value_heads=1",),
            "generation.tensor_parallel=2: must divide num_key_value_heads=1 evenly; use 1",
        ),
    ],
)
def test_what_cannot_be_shared_is_one_sentence(warm: Warm, words: tuple[str, ...], reported: str) -> None:
    assert reported in warm.refused(["mode=infer", "generation.tensor_parallel=2", *words])
