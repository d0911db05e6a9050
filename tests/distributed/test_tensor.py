"""Ranks that share every layer give one rank's tokens, hold a part of its weights and cache, and close their books."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from tests.distributed.conftest import Launch, complete, torchrun

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
COMMON = ("mode=infer", "precision=fp32", "generation.max_new_tokens=12", "generation.batch=5")
TENSOR, STAGES = "generation.tensor_parallel=2", "pipeline.stages=2"
RANDOM = ("model.random=true",)
SAMPLED = ("generation.sample=true", "generation.top_k=40")
STATIC = ("generation.cache=static", "generation.stop_at_eos=false")
PLACES: list[tuple[int, Words]] = [
    (2, (TENSOR,)),
    (2, (TENSOR, *STATIC)),
    (2, (TENSOR, "generation.cache=none", *SAMPLED)),
    (2, (TENSOR, *RANDOM, "generation.cache=static", *SAMPLED)),
    (4, (TENSOR, *RANDOM, "generation.batch=2")),
    (4, (TENSOR, *SAMPLED)),
    (4, (TENSOR, STAGES)),
    (4, (TENSOR, STAGES, *RANDOM, "generation.cache=static")),
]
"""Two ranks to a layer: of one replica, of two, and of two stages."""


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


def alone(words: Words) -> Words:
    """`words` as one rank would be asked."""
    return tuple(word for word in words if word not in (TENSOR, STAGES))


def tokens(directory: Path) -> list[list[int]]:
    complete(directory)
    return [json.loads(line)["tokens"] for line in (directory / "generations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("ranks", "words"), PLACES, ids=str)
def test_ranks_that_share_layers_give_one_ranks_tokens(
    run: Callable[..., Path], ranks: int, words: Words
) -> None:
    expected = tokens(run(1, alone(words)))
    assert tokens(run(ranks, words)) == expected
    assert len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("tied", 2, (TENSOR,)),
        ("tied", 2, (TENSOR, *RANDOM)),
        ("tied", 4, (TENSOR, STAGES)),
        ("experts", 2, (TENSOR,)),
        ("experts", 4, (TENSOR, STAGES)),
    ],
)
def test_tied_weights_and_experts_are_shared_too(
    run: Callable[..., Path], name: str, ranks: int, words: Words
) -> None:
    found = run(ranks, words, name)
    assert tokens(found) == tokens(run(1, alone(words), name))
    for rank in complete(found)["ranks"]:
        assert (rank["allocator"]["unattributed"], rank["allocator"]["foreign"]) == (0, 0)


@pytest.mark.parametrize(("ranks", "words"), PLACES, ids=str)
def test_every_rank_closes_its_books(run: Callable[..., Path], ranks: int, words: Words) -> None:
    found = complete(run(ranks, words))["ranks"]
    assert [rank["share"] for rank in found] == [0, 1] * (ranks // 2)
    for rank in found:
        assert (rank["allocator"]["unattributed"], rank["allocator"]["foreign"]) == (0, 0)
        assert sum(rank["peak"]["categories"].values()) == rank["peak"]["bytes"] == rank["allocator"]["peak"]
        assert rank["peak"]["saved"] == 0
        assert rank["categories"]["communication"]["peak"] > rank["categories"]["communication"]["end"] == 0


@pytest.mark.parametrize("words", [(TENSOR,), (TENSOR, *RANDOM)], ids=str)
def test_a_rank_has_its_part_of_each_weight_and_what_norms_and_rotary_tables_are(
    run: Callable[..., Path], words: Words
) -> None:
    head = HIDDEN // HEADS
    for rank in complete(run(2, words))["ranks"]:
        first = rank["share"] == 0
        width, vocabulary = (WIDTH + first) // 2, (VOCABULARY + first) // 2
        attention = 2 * HIDDEN * head * (HEADS + GROUPS) // 2
        layer = attention + 3 * HIDDEN * width + 2 * HIDDEN
        elements = 2 * vocabulary * HIDDEN + LAYERS * layer + HIDDEN
        assert rank["categories"]["parameters"]["end"] == 4 * (elements + 2 * head // 2)


def test_a_rank_caches_its_heads_and_all_ranks_what_one_would(run: Callable[..., Path]) -> None:
    whole, shared = complete(run(1, STATIC)), complete(run(2, (TENSOR, *STATIC)))
    counters = 8 * LAYERS
    (all_of_it,) = (rank["categories"]["kv_cache"]["peak"] for rank in whole["ranks"])
    for rank in shared["ranks"]:
        assert 2 * (rank["categories"]["kv_cache"]["peak"] - counters) == all_of_it - counters
    told, of_one = shared["inference"], whole["inference"]
    assert told["tensor_parallel"] == 2
    for figure in ("kv_filled", "kv_live", "kv_bytes_per_token", "kv_bytes_per_token_measured", "new_tokens"):
        assert told[figure] == of_one[figure]
    assert told["kv_reserved"] == of_one["kv_reserved"] + counters


@pytest.mark.parametrize("words", [(TENSOR,), (TENSOR, STAGES, *RANDOM, "generation.cache=static")], ids=str)
def test_two_runs_of_one_config_give_the_same_books(run: Callable[..., Path], words: Words) -> None:
    ranks = 4 if STAGES in words else 2
    assert complete(run(ranks, words))["ranks"] == complete(run(ranks, words, again=1))["ranks"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("model=gpt2", "transformers has no plan to share gpt2"),
        ("model.config.num_key_value_heads=1", "must divide num_key_value_heads=1 evenly; use 1"),
        (
            "model.config.hidden_size=192 model.config.num_attention_heads=3 model.config.num_key_value_heads=3",
            "must divide num_attention_heads=3 evenly; use 1",
        ),
    ],
)
def test_a_model_that_ranks_cannot_share_is_refused_once_and_nothing_is_left(
    tmp_path: Path, words: str, expected: str
) -> None:
    directory = tmp_path / "out"
    result = torchrun(["mode=infer", TENSOR, *words.split(" "), f"hydra.run.dir={directory}"])
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("harness:")]
    assert len(said) == 1
    assert said[0].startswith("harness: generation.tensor_parallel=2: ")
    assert expected in said[0]
    assert not directory.exists()
