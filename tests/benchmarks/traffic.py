"""What a step sends by a rehearsal, beside the volumes that others publish.

    python -m tests.benchmarks.traffic > profiles/traffic.md

Prints a page; every figure of this project on it is computed here, in about a minute.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from harness.analysis.moves.transfers import of_step
from harness.config.compose import compose
from harness.config.load import load
from harness.record.schema import Record
from harness.rehearsal.all_ranks import rehearsed
from tests.rehearsal.test_volumes import KEEPS_NOTHING

LLAMA = (
    *("mode=train", "model=llama2-7b", "world=rehearsed", "world.size=128", "hardware=cpu", "precision=bf16"),
    *("train.steps=100", "ledger.steps=2", "train.sequence=512", "train.micro_batch=1"),
)
"""The second step is taken: in the first one ZeRO-3 records the order of its parameters."""

AICB = "AICB `workload/physical/model_workload`, Llama-7B, 128 ranks"
PAPER = "arXiv 1910.02054, section 7"
NUMBERS = 64
"""Bytes of a row that has only losses, norms and flags."""


class Row(NamedTuple):
    """A published volume, and what is counted. `reason` says why they differ."""

    config: str
    what: str
    published: int
    source: str
    counted: int
    reason: str = ""


def main() -> None:
    print(
        "# What moves: published and counted\n\n"
        f"By `python -m tests.benchmarks.traffic`, torch {torch.__version__}. Payload bytes of one step of one rank, "
        "counted in rehearsals\nwith DeepSpeed's own code; where a paper counts what is sent, a ring's "
        "(n - 1) / n is taken as 1.\n"
    )
    print("| config | what | published, B | counted, B | difference | source, and why they differ |")
    print("|---|---|---:|---:|---:|---|")
    for row in rows():
        why = f"{row.source}. {row.reason}" if row.reason else row.source
        print(
            f"| {row.config} | {row.what} | {row.published:,} | {row.counted:,} "
            f"| {row.counted - row.published:+,} | {why} |"
        )


def rows() -> Iterator[Row]:
    """Every row of the page."""
    with tempfile.TemporaryDirectory() as directory:
        plain = Path(directory, "deepspeed.json")
        plain.write_text(json.dumps({"zero_optimization": KEEPS_NOTHING}))
        record, sent = volumes(f"deepspeed.config={plain}")
    whole = (record.model.parameters or 0) * 2
    config = "Llama-7B, ZeRO-3, 128 ranks, nothing kept"
    for phase, operation in (
        ("forward", "all-gather"),
        ("backward", "all-gather"),
        ("backward", "reduce-scatter"),
    ):
        yield Row(config, f"{operation}, {phase}", 13_476_831_232, AICB, sent[phase, operation])
    yield Row(config, "sent in a step, 3 P", 3 * whole, PAPER, wire(sent))
    _, sent = volumes("zero=3")
    config = "the same with the harness's defaults"
    kept = (2 * 32 + 1) * 4096 * 2  # the norms are below zero.persistence_threshold
    twice = sent["forward", "all-gather"] - (whole - kept)
    alive = whole - kept - sent["backward", "all-gather"]
    for phase, operation, why in (
        ("forward", "all-gather", f"the norms ({kept:,} B) stay; {twice:,} B are let go and gathered twice"),
        (
            "backward",
            "all-gather",
            f"the norms stay, and {alive:,} B are there from the forward (1e9 live parameters)",
        ),
        ("backward", "reduce-scatter", ""),
    ):
        yield Row(config, f"{operation}, {phase}", 13_476_831_232, AICB, sent[phase, operation], why)
    _, sent = volumes("zero=2")
    config = "Llama-7B, ZeRO-2, 128 ranks"
    yield Row(config, "all-reduce", 13_476_831_232, AICB, sent["backward", "all-reduce"])
    yield Row(config, "all-gather", 13_476_831_232, AICB, sent["step", "all-gather"])
    why = "DeepSpeed 0.19 reduces whole buckets to every rank (an all-reduce, 2 P), and not each part to its rank (P)"
    yield Row(config, "sent in a step, 2 P", 2 * whole, PAPER, wire(sent), why)
    _, sent = volumes("zero=0")
    yield Row("Llama-7B, ZeRO-0, 128 ranks", "sent in a step, 2 P", 2 * whole, PAPER, wire(sent))


def volumes(*words: str) -> tuple[Record, Counter[tuple[str, str]]]:
    """The record of a rehearsal, and the payload of its second step by phase and operation."""
    record = rehearsed(load(compose([*LLAMA, *words])), words, parallel=False)
    sent = Counter[tuple[str, str]]()
    for row in of_step(record, record.ranks[0]) or ():
        if row.bytes > NUMBERS:
            sent[row.phase, row.operation] += row.bytes
    return record, sent


def wire(sent: Counter[tuple[str, str]]) -> int:
    """What a rank sends by ring, with (n - 1) / n taken as 1: an all-reduce sends its payload twice."""
    return sum(
        nbytes * (2 if operation == "all-reduce" else 1)
        for (_, operation), nbytes in sent.items()
        if operation.startswith(("all-", "reduce"))
    )


if __name__ == "__main__":
    main()
