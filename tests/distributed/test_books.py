"""The books of real runs on two ranks: they close to the byte, and every buffer has its name."""

from collections.abc import Callable
from typing import Any

import pytest

from harness.ledger import CATEGORIES

Trained = Callable[..., dict[str, Any]]

SHALLOW = "model.config.num_hidden_layers=2"
# vocabulary 1000 and as many KV heads as heads: 2,094,336 parameters
STATES = (
    SHALLOW,
    "precision=bf16",
    "model.config.vocab_size=1000",
    "model.config.num_key_value_heads=4",
    "zero.reduce_bucket_size=500000",
)
N = 2_094_336


def phase(rank: dict[str, Any], step: int, name: str) -> dict[str, Any]:
    return next(p for p in rank["phases"] if (p["step"], p["phase"]) == (step, name))


@pytest.mark.parametrize(
    ("zero", "precision"),
    [
        *((zero, "fp32") for zero in (0, 1, 2, 3)),
        *((zero, "bf16") for zero in (0, 2, 3)),
        pytest.param(
            1, "bf16", marks=pytest.mark.exhaustive
        ),  # DeepSpeed's optimizer of stages 1 and 2 is one
    ],
)
def test_categories_and_kernel_are_the_allocators_peak_on_every_rank(
    trained: Trained, zero: int, precision: str
) -> None:
    record = trained(SHALLOW, f"zero={zero}", f"precision={precision}")
    assert len(record["ranks"]) == 2
    for rank in record["ranks"]:
        peak, allocator = rank["peak"], rank["allocator"]
        assert set(peak["categories"]) == {*CATEGORIES, "kernel"}
        assert (allocator["source"], allocator["unattributed"], allocator["foreign"]) == ("cpu-events", 0, 0)
        assert sum(peak["categories"].values()) == peak["bytes"] == allocator["peak"]


@pytest.mark.parametrize("words", [("zero=2", "zero.offload=optimizer"), ("zero=3", "zero.offload=all")])
def test_the_books_close_with_offload_and_accumulation(trained: Trained, words: tuple[str, ...]) -> None:
    for rank in trained(SHALLOW, *words, "train.accumulation=2")["ranks"]:
        assert rank["allocator"]["unattributed"] == 0
        assert sum(rank["peak"]["categories"].values()) == rank["allocator"]["peak"]


RECOMPUTING: dict[str, tuple[str, ...]] = {
    "zero=1": (SHALLOW, "zero=1", "train.accumulation=2"),
    "zero=3": (
        *(SHALLOW, "zero=3", "zero.persistence_threshold=0", "zero.prefetch_bucket_size=200000"),
        "+model.config.attention_bias=true",
    ),
    "dropout": (
        *(
            "zero=2",
            "model=gpt2",
            "model.config.n_layer=2",
            "model.config.n_embd=64",
            "model.config.n_head=2",
        ),
        *("model.config.n_positions=64", "model.config.vocab_size=500"),
        *("model.config.bos_token_id=1", "model.config.eos_token_id=1"),
    ),
    "stages": ("zero=1", "pipeline.stages=2", "train.accumulation=4"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive][: name == "zero=1"]) for name in RECOMPUTING]
)
def test_recomputation_changes_no_loss_and_every_byte_of_it_is_named(trained: Trained, name: str) -> None:
    words = RECOMPUTING[name]
    plain = trained(*words)
    for mode in ("selective", "full"):
        record = trained(*words, f"checkpointing={mode}")
        assert record["training"]["losses"] == plain["training"]["losses"]
        for rank, before in zip(record["ranks"], plain["ranks"], strict=True):
            assert rank["allocator"]["unattributed"] == 0
            assert sum(rank["peak"]["categories"].values()) == rank["allocator"]["peak"]
            kept, was = (sum(each["forwards"]["stashes"]) for each in (rank, before))
            assert kept < was
            recomputed = {p["phase"] for p in rank["phases"] if p["recomputed"]}
            assert recomputed <= {"backward"}


@pytest.mark.parametrize("name", ["zero=3", "stages"])
def test_an_offload_of_activations_changes_no_loss_and_every_byte_of_it_is_named(
    trained: Trained, name: str
) -> None:
    words = RECOMPUTING[name]
    record = trained(*words, "checkpointing=full", "checkpointing.offload=cpu")
    assert record["training"]["losses"] == trained(*words)["training"]["losses"]
    for rank in record["ranks"]:
        assert rank["allocator"]["unattributed"] == 0
        assert sum(rank["peak"]["categories"].values()) == rank["allocator"]["peak"]
        assert rank["on_host"]["activations"] == sum(rank["forwards"]["stashes"]) > 0


def test_zero3_states_are_exact(trained: Trained) -> None:
    record = trained("zero=3", "zero.persistence_threshold=0", *STATES)
    assert record["model"]["parameters"] == N
    for rank in record["ranks"]:
        categories = rank["categories"]
        buffers = 2 * 64 * 4 // 2 // 2  # two rotary tables of 32 frequencies in fp32, which no rank shards
        masters, moments = 4 * N // 2, 8 * N // 2 + 4
        assert categories["parameters"]["end"] == 2 * N // 2 + 2 * buffers
        assert categories["gradients"]["end"] == 2 * N // 2
        assert categories["optimizer"]["end"] == masters + moments
        assert categories["communication"]["end"] == 2 * 500_000  # the reduce bucket stays; gather buffers go


def test_adam_jumps_at_the_first_step_and_the_buckets_are_communication(trained: Trained) -> None:
    for rank in trained("zero=2", *STATES)["ranks"]:
        before, after = phase(rank, 0, "backward"), phase(rank, 1, "forward")
        assert before["categories"]["optimizer"] == 4 * N // 2
        assert after["categories"]["optimizer"] == 4 * N // 2 + 8 * N // 2 + 4
        assert rank["categories"]["communication"]["peak"] > 0


def test_only_zero3_gathers_parameters_and_it_lets_them_go(trained: Trained) -> None:
    for zero in (0, 1, 2):
        for rank in trained(SHALLOW, f"zero={zero}", "precision=fp32")["ranks"]:
            assert rank["categories"]["gathered"] == {"peak": 0, "end": 0}
    for rank in trained("zero=3", "zero.persistence_threshold=0", *STATES)["ranks"]:
        assert rank["categories"]["gathered"]["peak"] > 0
        assert rank["categories"]["gathered"]["end"] == 0


def test_no_buffer_of_deepspeeds_passes_for_an_activation(trained: Trained) -> None:
    operators = set()
    for zero, precision in ((0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")):
        for rank in trained(SHALLOW, f"zero={zero}", f"precision={precision}")["ranks"]:
            holdings = rank["peak"]["holdings"]
            assert (
                sum(h["bytes"] for h in holdings) + rank["peak"]["categories"]["kernel"]
                == rank["peak"]["bytes"]
            )
            operators |= {h["name"].rpartition(": ")[2] for h in holdings if h["category"] == "activations"}
    assert "mm" in operators
    assert "empty" not in operators, "a forward makes activations by operators, and buffers by empty"


def test_every_living_byte_at_the_end_of_a_zero3_run_has_an_owner(trained: Trained) -> None:
    for rank in trained("zero=3", "zero.persistence_threshold=0", *STATES)["ranks"]:
        ends = {name: category["end"] for name, category in rank["categories"].items()}
        assert ends["activations"] == ends["kv_cache"] == 0
        assert ends["workspace"] < 1000  # norms and flags of a few bytes each, by name


@pytest.mark.parametrize("words", [("zero=2", "precision=bf16"), ("zero=3", "precision=bf16")])
def test_two_runs_of_one_config_give_one_record(trained: Trained, words: tuple[str, ...]) -> None:
    first, second = trained(SHALLOW, *words), trained(SHALLOW, *words, again=1)
    assert first["ranks"] == second["ranks"]
    assert first["training"] == second["training"]


def test_the_ledger_does_not_change_the_losses(trained: Trained) -> None:
    losses = {
        mode: trained(SHALLOW, "zero=2", "precision=bf16", *words)["training"]["losses"]
        for mode, words in {"exact": (), "phases": ("ledger=phases",), "off": ("ledger=off",)}.items()
    }
    assert losses["exact"] == losses["phases"] == losses["off"]


def test_zero_stages_train_alike(trained: Trained) -> None:
    plain = trained(SHALLOW, "zero=0", "precision=fp32")["training"]["losses"]
    for zero in (1, 2, 3):
        assert trained(SHALLOW, f"zero={zero}", "precision=fp32")["training"]["losses"] == pytest.approx(
            plain, rel=1e-5
        )
