"""Stages whose ranks share their layers give one rank's tokens, hold their part of it, and close their books."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from tests.distributed.conftest import Launch, complete

Words = tuple[str, ...]

PROMPTS = ["def run(", "import os", "x", "class Reader(object):", "as"]
LAYERS, HIDDEN, WIDTH, HEADS, GROUPS, VOCABULARY = 4, 64, 97, 4, 2, 385
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Neither the vocabulary nor the width of a layer is even."""
COMMON = ("mode=infer", "precision=fp32", "generation.max_new_tokens=8", "generation.batch=5")
BOTH = ("generation.tensor_parallel=2", "pipeline.stages=2")
RANDOM = ("model.random=true",)
SAMPLED = ("generation.sample=true", "generation.top_k=40")
STATIC = ("generation.cache=static", "generation.stop_at_eos=false")
PLACES: list[Words] = [(), SAMPLED, (*RANDOM, *STATIC)]


def saved(config: PretrainedConfig, directory: Path) -> Path:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that says something else after each prompt; one with tied weights; one of experts, which are merged."""
    top = tmp_path_factory.mktemp("models")
    experts = {**SHAPE, "intermediate_size": 96, "num_local_experts": 4}
    return {
        "plain": saved(LlamaConfig(**SHAPE), top / "plain"),
        "tied": saved(LlamaConfig(**SHAPE, tie_word_embeddings=True), top / "tied"),
        "experts": saved(MixtralConfig(**experts), top / "experts"),
    }


@pytest.fixture(scope="module")
def run(
    launch: Launch, tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]
) -> Callable[..., Path]:
    """A function of a number of ranks, words and a checkpoint's name to the directory of that run."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")

    def given(ranks: int, words: Words, name: str = "plain", again: int = 0) -> Path:
        model = f"model.path={checkpoints[name]}"
        return launch(*COMMON, model, f"generation.prompts={file}", *words, ranks=ranks, again=again)

    return given


def tokens(directory: Path) -> list[list[int]]:
    complete(directory)
    return [json.loads(line)["tokens"] for line in (directory / "generations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("words", PLACES, ids=str)
def test_stages_of_ranks_that_share_layers_give_one_ranks_tokens(
    run: Callable[..., Path], words: Words
) -> None:
    expected = tokens(run(1, words))
    assert tokens(run(4, (*BOTH, *words))) == expected
    assert len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize("name", ["tied", "experts"])
def test_tied_weights_and_experts_that_a_checkpoint_has_apart_are_shared_too(
    run: Callable[..., Path], name: str
) -> None:
    assert tokens(run(4, BOTH, name)) == tokens(run(1, (), name))


@pytest.mark.parametrize("words", PLACES, ids=str)
def test_every_rank_closes_its_books(run: Callable[..., Path], words: Words) -> None:
    actual = complete(run(4, (*BOTH, *words)))["ranks"]
    assert [(rank["stage"], rank["share"]) for rank in actual] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for rank in actual:
        assert (rank["allocator"]["unattributed"], rank["allocator"]["foreign"]) == (0, 0)
        assert sum(rank["peak"]["categories"].values()) == rank["peak"]["bytes"] == rank["allocator"]["peak"]
        assert rank["peak"]["saved"] == 0


@pytest.mark.parametrize("words", [(), RANDOM], ids=str)
def test_a_rank_has_its_part_of_its_stages_weights(run: Callable[..., Path], words: Words) -> None:
    head = HIDDEN // HEADS
    for rank in complete(run(4, (*BOTH, *words)))["ranks"]:
        first = rank["share"] == 0
        width, vocabulary = (WIDTH + first) // 2, (VOCABULARY + first) // 2
        attention = 2 * HIDDEN * head * (HEADS + GROUPS) // 2
        layer = attention + 3 * HIDDEN * width + 2 * HIDDEN
        elements = vocabulary * HIDDEN + LAYERS // 2 * layer + (HIDDEN if rank["stage"] else 0)
        assert rank["categories"]["parameters"]["end"] == 4 * (elements + 2 * head // 2)


def test_all_ranks_cache_what_one_would(run: Callable[..., Path]) -> None:
    together = ("pipeline.groups=1", "generation.stop_at_eos=false")
    whole, shared = (
        complete(run(*each))["inference"] for each in ((1, together[1:]), (4, (*BOTH, *together)))
    )
    assert shared["tensor_parallel"] == 2
    for figure in ("kv_reserved", "kv_filled", "kv_live", "kv_bytes_per_token_measured", "new_tokens"):
        assert shared[figure] == whole[figure]


def test_two_runs_of_one_config_give_the_same_books(run: Callable[..., Path]) -> None:
    assert complete(run(4, BOTH))["ranks"] == complete(run(4, BOTH, again=1))["ranks"]
