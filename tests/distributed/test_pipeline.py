"""A pipeline trains the model that one rank trains, keeps what its schedule says, and its books close."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.conftest import NARROW, Launch, complete

Words = tuple[str, ...]

MICRO_BATCHES = 5
COMMON = (
    "mode=train",
    "hardware=cpu",
    "train.steps=3",
    "train.sequence=32",
    "train.micro_batch=2",
    f"train.accumulation={MICRO_BATCHES}",
    "train.validate_every=3",
    "train.validation_batches=2",
)
TIED = "model.config.tie_word_embeddings=true"
KINDS = [
    ("zero=0", "precision=fp32"),
    ("zero=1", "precision=fp32"),
    ("zero=0", "precision=bf16"),
    ("zero=1", "precision=bf16"),
]
ALONE = ("zero=0", "precision=bf16", "pipeline.stages=2", "train.accumulation=1")
LONG = ("zero=0", "precision=fp32", "pipeline.stages=4", "train.sequence=128", "train.steps=2")
"""Peaks where its activations do."""
RUNS: dict[int, list[Words]] = {
    1: [*KINDS, ("zero=0", "precision=fp32", TIED)],
    2: [
        *((*kind, "pipeline.stages=2") for kind in KINDS),
        ("zero=0", "precision=fp32", TIED, "pipeline.stages=2"),
        *(kind for kind in KINDS if kind[0] == "zero=1"),
        ALONE,
    ],
    4: [
        ("zero=1", "precision=fp32", "pipeline.stages=4"),
        ("zero=1", "precision=bf16", "pipeline.stages=4"),
        ("zero=1", "precision=fp32", TIED, "pipeline.stages=4"),
        *((*kind, "pipeline.stages=2") for kind in KINDS if kind[0] == "zero=1"),
        LONG,
    ],
}

FP32 = 1e-6
"""Rounding of losses of about 5 and of weights after three steps: sums of gradients are made in another order."""
BF16 = 5e-3
"""The same of losses in bf16, where optimizers of DeepSpeed's add up micro-batches in bf16 or in fp32."""
MEAN = 1e-5
"""A hundredth of a step's learning rate: in bf16 a gradient near zero may have the other sign."""


@pytest.fixture(scope="module")
def run(launch: Launch) -> Callable[..., Path]:
    """A function of a number of ranks and words to the directory of that run."""

    def given(ranks: int, *words: str) -> Path:
        width = () if any(word.startswith("model.path=") for word in words) else NARROW
        return launch(*COMMON, *width, *words, ranks=ranks)

    return given


def losses(directory: Path) -> list[float]:
    actual = complete(directory)["training"]
    return [*actual["losses"], *(each["loss"] for each in actual["validation"])]


PIPELINED = [
    (ranks, words) for ranks in (2, 4) for words in RUNS[ranks] if any("stages" in word for word in words)
]


EXHAUSTIVE = {
    (4, ("zero=1", "precision=bf16", "pipeline.stages=4")),
    (4, ("zero=1", "precision=fp32", TIED, "pipeline.stages=4")),
    (4, ("zero=1", "precision=fp32", "pipeline.stages=2")),
}
"""Each is the product of two others: stages and a precision, tied weights, or replicas."""


def cells(pipelined: list[tuple[int, Words]]) -> list[Any]:
    """These ranks and words as pytest's parameters."""
    marks = pytest.mark.exhaustive
    return [pytest.param(*each, marks=[marks] if each in EXHAUSTIVE else []) for each in pipelined]


def whole_of(ranks: int, words: Words) -> tuple[int, Words]:
    """The same run without a pipeline: as many replicas of the whole."""
    stages = next(int(word.partition("=")[2]) for word in words if "stages" in word)
    same = tuple(word for word in words if "stages" not in word)
    if TIED in same:
        same = ("zero=0", *same[1:])
    return ranks // stages, same


@pytest.mark.parametrize(
    ("ranks", "words"), cells([each for each in PIPELINED if each[1] not in (ALONE, LONG)]), ids=str
)
def test_losses_and_weights_are_those_of_the_whole_model(
    run: Callable[..., Path], ranks: int, words: Words
) -> None:
    replicas, same = whole_of(ranks, words)
    pipelined, whole = run(ranks, *words), run(replicas, *same)
    precision = "bf16" if "precision=bf16" in words else "fp32"
    assert losses(pipelined) == pytest.approx(losses(whole), abs=BF16 if precision == "bf16" else FP32)
    ours, theirs = (load_file(each / "checkpoint/model.safetensors") for each in (pipelined, whole))
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(weight - theirs[name]).float().abs().flatten() for name, weight in ours.items()])
    assert (apart.mean() < MEAN) if precision == "bf16" else (apart.max() < FP32)


def test_the_first_step_without_zero_is_adams_first(run: Callable[..., Path]) -> None:
    plain, sharded = (losses(run(1, zero, "precision=bf16")) for zero in ("zero=0", "zero=1"))
    assert plain == pytest.approx(sharded, abs=BF16)


@pytest.mark.parametrize(("ranks", "words"), cells(PIPELINED), ids=str)
def test_every_rank_closes_its_books(run: Callable[..., Path], ranks: int, words: Words) -> None:
    actual = complete(run(ranks, *words))
    assert len(actual["ranks"]) == ranks
    for rank in actual["ranks"]:
        assert rank["allocator"]["unattributed"] == 0
        assert sum(rank["peak"]["categories"].values()) == rank["peak"]["bytes"] == rank["allocator"]["peak"]


@pytest.mark.parametrize(("ranks", "words"), cells(PIPELINED), ids=str)
def test_a_stage_keeps_a_forward_for_each_stage_from_it_on(
    run: Callable[..., Path], ranks: int, words: Words
) -> None:
    actual = complete(run(ranks, *words))
    stages, micro_batches = actual["pipeline"]["stages"], actual["pipeline"]["micro_batches"]
    for rank in actual["ranks"]:
        assert rank["stage"] == rank["rank"] * stages // ranks
        assert rank["forwards"]["alive"] == min(stages - rank["stage"], micro_batches)
        assert rank["forwards"]["bytes"] == sum(rank["forwards"]["stashes"]) > 0
        assert len(set(rank["forwards"]["stashes"])) == 1  # every micro-batch keeps as much


@pytest.mark.parametrize(("ranks", "words"), [(1, each) for each in RUNS[1]], ids=str)
def test_a_whole_model_keeps_one(run: Callable[..., Path], ranks: int, words: Words) -> None:
    (rank,) = complete(run(ranks, *words))["ranks"]
    assert rank["forwards"]["alive"] == 1


def test_what_crosses_between_stages_is_called_by_its_name(run: Callable[..., Path]) -> None:
    hidden = 2 * 128 * 64 * 4  # micro-batch, sequence, width, fp32
    for rank in complete(run(4, *LONG))["ranks"]:
        named = {h["name"].partition("Engine.")[2]: h for h in rank["peak"]["holdings"]}
        given = rank["forwards"]["alive"] + (
            rank["stage"] == 3
        )  # the last keeps its last logits, and their graph it
        expected = {"pipe_buffers[inputs]": given, "pipe_recv_buf": 1} if rank["stage"] else {"grad_layer": 1}
        for name, storages in expected.items():
            assert named[name]["category"] == "activations"
            assert (named[name]["storages"], named[name]["bytes"]) == (storages, storages * hidden)


def test_an_export_of_two_stages_opens_whole_and_in_four(run: Callable[..., Path], tmp_path: Path) -> None:
    words: Words = ("zero=1", "precision=fp32", "pipeline.stages=2")
    checkpoint = run(2, *words) / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.num_parameters() == complete(run(2, *words))["model"]["parameters"]
    again = ("zero=1", "precision=fp32", f"model.path={checkpoint}", "train.export=false")
    actual = {ranks: losses(run(ranks, *again, f"pipeline.stages={ranks}")) for ranks in (1, 4)}
    assert actual[4] == pytest.approx(actual[1], abs=FP32)
    assert actual[4][0] < losses(run(2, *words))[0]


def test_an_export_has_the_buffers_of_every_stage_and_the_generation_config(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    built = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("glm4_moe", **sizes, **heads, **experts, pad_token_id=0)
    )
    for name, buffer in built.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.rand_like(buffer))
    built.save_pretrained(tmp_path)
    fields = {"num_return_sequences": 3, "temperature": 0.6, "eos_token_id": [1, 6], "own_setting": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    given = load_file(tmp_path / "model.safetensors")
    for stages in (1, 3):
        words = ("zero=0", "precision=fp32", f"model.path={tmp_path}", f"pipeline.stages={stages}")
        directory = run(stages, *words, "train.steps=1", "train.validate_every=0")
        kept = load_file(directory / "checkpoint/model.safetensors")
        assert kept.keys() == given.keys()
        assert json.loads((directory / "checkpoint/generation_config.json").read_text()) == fields
        routers = [name for name in given if name.endswith("e_score_correction_bias")]
        assert len(routers) == 2
        assert all(torch.equal(kept[name], given[name]) for name in routers)
