"""What a step sends, against the volumes that papers state, in exact terms."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness.analysis.moves.transfers import of_step
from harness.config.compose import compose
from harness.config.layout import Layout
from harness.config.load import load
from harness.ledger import Ledger
from harness.record.schema import Record
from harness.rehearsal.all_ranks import rehearsed
from harness.rehearsal.world import rehearsed as world
from harness.runtime.imports import import_deepspeed

RANKS, BF16 = 8, 2
TRAIN = (
    *("mode=train", "model=tiny", "world=rehearsed", f"world.size={RANKS}", "hardware=cpu", "precision=bf16"),
    *("train.steps=2", "ledger.steps=2", "train.sequence=32", "train.validate_every=0", "train.export=false"),
)
KEEPS_NOTHING = {
    "stage": 3,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
"""ZeRO-3 as its paper has it: each parameter is gathered for its forward and its backward, and nothing else stays."""

NUMBERS = 64
"""Bytes of a row that has only losses, norms and flags."""

Sent = Counter[tuple[str, str]]
Volumes = Callable[..., tuple[Record, Sent]]


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    """The record of a rehearsal, and the payload bytes of its second step by phase and operation."""

    def of(*words: str, zero: dict[str, object] | None = None) -> tuple[Record, Sent]:
        if zero is not None:
            (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero}))
            words = (*words, f"deepspeed.config={tmp_path / 'deepspeed.json'}")
        record = rehearsed(load(compose([*TRAIN, *words])), words, parallel=False)
        rows = of_step(record, record.ranks[0])
        assert rows is not None
        sent: Sent = Counter()
        for row in rows:
            if row.bytes > NUMBERS:
                sent[row.phase, row.operation] += row.bytes
        return record, sent

    return of


def parameters(record: Record) -> int:
    """The bytes of the parameters."""
    assert record.model.parameters is not None
    return record.model.parameters * BF16


def test_without_zero_each_gradient_is_reduced_once(volumes: Volumes) -> None:
    record, sent = volumes("zero=0")
    assert sent == {("backward", "all-reduce"): parameters(record)} | reads(sent)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_reduce_whole_gradients_and_gather_parameters(volumes: Volumes, stage: int) -> None:
    """The paper sends 2 P: it reduces each gradient to one rank. DeepSpeed 0.19 reduces whole buckets to all: 3 P."""
    record, sent = volumes(f"zero={stage}")
    reduced, gathered = ("backward", "all-reduce"), ("step", "all-gather")
    assert sent == {reduced: parameters(record), gathered: parameters(record)} | reads(sent)


def reads(sent: Sent) -> Sent:
    """What is read from disk."""
    return Counter({key: nbytes for key, nbytes in sent.items() if key[1] == "read"})


def test_zero_2_reduces_each_micro_batch(volumes: Volumes) -> None:
    record, sent = volumes("zero=2", "train.accumulation=3")
    assert sent["backward", "all-reduce"] == 3 * parameters(record)


def test_zero_3_sends_three_times_the_parameters(volumes: Volumes) -> None:
    record, sent = volumes(zero=KEEPS_NOTHING)
    whole = parameters(record)
    volume = sent["forward", "all-gather"], sent["backward", "all-gather"], sent["backward", "reduce-scatter"]
    assert volume == (whole, whole, whole)


def test_what_zero_3_keeps_it_does_not_gather_again(volumes: Volumes) -> None:
    record, sent = volumes("zero=3")
    (kept,) = {
        nbytes for (phase, operation), nbytes in sent.items() if (phase, operation) == ("step", "all-gather")
    }
    assert (
        kept == 9 * 256 * BF16
    )  # the norms, below zero.persistence_threshold, are gathered after each update
    assert sent["forward", "all-gather"] == parameters(record) - kept
    assert sent["backward", "all-gather"] == 0  # all of tiny lives until its backward
    assert sent["backward", "reduce-scatter"] == parameters(record)


def test_ulysses_sends_four_parts_of_a_layer() -> None:
    """DeepSpeed-Ulysses' blog: an all-to-all of N h / P elements for each of q, k, v and the result."""
    deepspeed: Any = import_deepspeed()
    from deepspeed.sequence.layer import DistributedAttention

    batch, tokens, heads, width = 2, 64, 8, 4
    with world(0, Layout(RANKS)):
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        attention = DistributedAttention(
            lambda q, k, v, *rest: q, dist.group.WORLD, scatter_idx=2, gather_idx=1
        )
        q, k, v = (torch.ones(batch, tokens // RANKS, heads, width) for _ in range(3))
        with Ledger(device="cpu", allocator=False) as ledger, ledger.phase("forward"):
            attention(q, k, v, 0)
    (amounts,) = ledger.traffic.amounts().values()
    assert {moved.operation for moved in amounts} == {"all-to-all"}
    assert sum(nbytes for _, nbytes in amounts.values()) == 4 * batch * tokens * heads * width // RANKS * 4
