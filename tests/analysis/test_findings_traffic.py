"""What `explain` says of traffic: what moves most, and the setting that would move less of it."""

from dataclasses import asdict
from typing import Any

import pytest

from harness.analysis.findings.finding import Finding, Run
from harness.analysis.findings.traffic import moves
from harness.config.compose import compose
from harness.config.load import load
from harness.record.schema import parse

ZERO_3 = (
    "ZeRO-3 gathers parameters for each forward and backward; zero=2 does once a step, and holds them whole."
)


def finding(words: str, *rows: tuple[str, str, int, str, int]) -> Finding | None:
    """What is said of a run of `words` that moves `rows`: phase, operation, micro-batch, link and bytes."""
    settings = asdict(load(compose([*words.split(), "model=tiny", "world.size=2"])))
    keys = "phase", "operation", "micro_batch", "link", "bytes"
    traffic = [
        {
            "step": 1,
            "calls": 1,
            **dict(zip(keys, row, strict=True)),
            "causes": [{"name": "layers.*.weight", "bytes": row[-1]}],
        }
        for row in rows
    ]
    unknown: dict[str, Any] = {"peak": {"bytes": None, "where": None, "categories": {}}, "categories": {}}
    record: dict[str, Any] = {
        "status": "complete",
        "mode": settings["mode"],
        "world": {"size": 2, "device": "cuda"},
        "model": {"name": "tiny", "parameters": 8, "dtype": "float32"},
        "config": settings,
        "ranks": [
            {**unknown, "rank": 0, "traffic": traffic, "allocator": {"peak": None, "unattributed": None}}
        ],
    }
    return next(moves(Run(parse(record, "made up"))), None)


@pytest.mark.parametrize(
    ("words", "row", "said"),
    [
        ("mode=train zero=2", ("backward", "all-reduce", 0), ""),
        (
            "mode=train zero=1",
            ("backward", "all-reduce", 0),
            "A larger train.accumulation moves it for more tokens.",
        ),
        ("mode=train zero=3", ("forward", "all-gather", 0), ZERO_3),
        ("mode=train zero=2", ("step", "all-gather", 0), ""),
        (
            "mode=infer generation.tensor_parallel=2",
            ("decode", "all-reduce", 0),
            "pipeline.stages= in place of generation.tensor_parallel= sends hidden states alone.",
        ),
        ("mode=infer", ("decode", "send", 0), ""),
    ],
)
def test_what_moves_most_is_named_with_a_setting_that_moves_less(
    words: str, row: tuple[str, str, int], said: str
) -> None:
    phase, operation, _ = row
    found = finding(words, (*row, "nvlink", 4096), ("setup", "broadcast", 0, "nvlink", 2**20))
    unit = "step" if "train" in words else "batch"
    begins = (
        f"A {unit} moves 4.0 KiB on rank 0: 4.0 KiB of it by {operation} in {phase} over nvlink, most for "
    )
    assert found == Finding("traffic", f"{begins}layers.*.weight. {said}".rstrip(), 4096)


def test_gradients_that_each_micro_batch_reduces_are_named() -> None:
    rows = [("backward", "reduce-scatter", number, "network", 1024) for number in (0, 1)]
    found = finding("mode=train zero=2 train.accumulation=2", *rows)
    assert found is not None
    assert found.bytes == 2048
    assert found.sentence.endswith(
        "ZeRO-2 reduces the gradients of each of 2 micro-batches; zero=1 reduces their sum once."
    )


def test_copies_count_where_a_setting_asks_for_them() -> None:
    copies = ("step", "host-to-device", 0, "pcie", 4096)
    assert finding("mode=train zero=2", copies) is None
    found = finding("mode=train zero=2 zero.offload=optimizer", copies)
    assert found is not None
    assert found.sentence.endswith(
        "zero.offload=optimizer is why it comes and goes, and saves the device that memory."
    )


def test_what_a_run_reads_alone_is_no_finding() -> None:
    assert finding("mode=train zero=2", ("data", "read", 0, "storage", 4096)) is None
