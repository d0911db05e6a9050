"""A trace has every event of a rank, by its final name, and adds up to what the record says."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from harness import Ledger
from harness.__main__ import main
from harness.record import trace
from harness.record.record_file import read
from harness.report import points

WORDS = (
    "mode=train precision=bf16 zero=2 model=tiny hardware=cpu train.steps=2 train.sequence=32 "
    "world=rehearsed world.size=2"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rehearsed run with its traces."""
    directory = tmp_path_factory.mktemp("run") / "out"
    assert main([*WORDS.split(), f"hydra.run.dir={directory}"]) == 0
    return directory


def table(run: Path) -> pa.Table:
    actual = trace.read(run, 0)
    assert actual is not None
    return actual


def test_what_is_alive_at_the_end_is_what_the_record_says(run: Path) -> None:
    ends = {
        name: measured["end"]
        for name, measured in read(run)["ranks"][0]["categories"].items()
        if measured["end"]
    }
    grown = table(run).group_by("category").aggregate([("bytes", "sum")]).to_pylist()
    assert {row["category"]: row["bytes_sum"] for row in grown if row["bytes_sum"]} == ends


def test_its_highest_point_is_the_peak_by_category(run: Path) -> None:
    peak = read(run)["ranks"][0]["peak"]
    actual = points.drawn(points.of_table(table(run)))
    at_peak = {name: measured[actual["peak"]] for name, measured in actual["categories"].items()}
    assert {name: measured for name, measured in at_peak.items() if measured} == {
        name: measured for name, measured in peak["categories"].items() if measured
    }
    assert actual["saved"][actual["peak"]] == peak["saved"]


def test_parameters_in_one_buffer_are_told_one_by_one(run: Path) -> None:
    rows = table(run).filter(pc.field("category") == "parameters")
    names = set(rows.column("name").to_pylist())
    assert {"model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight", "model.norm.weight"} <= names
    measured = points.at_peak(points.of_table(table(run)))["model.layers.3.mlp.down_proj"]["parameters"]
    assert measured == 2 * 128 * 1376  # bfloat16, hidden and intermediate size
    by_name = {each["name"]: each for each in read(run)["ranks"][0]["peak"]["holdings"]}
    assert by_name["model.layers.3.mlp.down_proj.weight"]["bytes"] == measured


def test_a_rehearsal_has_no_time_and_a_real_run_has(run: Path) -> None:
    assert table(run).column("nanoseconds").null_count == table(run).num_rows
    with Ledger() as ledger:
        kept = torch.ones(10)
    timed = trace.of_ledger(ledger).column("nanoseconds").to_pylist()
    assert timed == sorted(timed)
    assert timed[0] == 0
    assert kept.numel() == 10


def test_none_is_left_where_none_is_asked_for(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    assert main([*WORDS.split(), "ledger.trace=false", f"hydra.run.dir={directory}"]) == 0
    assert not (directory / trace.DIRECTORY).exists()
    assert trace.read(directory, 0) is None


@pytest.mark.parametrize("content", [b"", b"PAR1 corrupt", b"[]"], ids=["empty", "corrupt", "other"])
def test_what_is_no_trace_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / trace.DIRECTORY / "rank-0.parquet"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-0\.parquet is not a trace: "):
        trace.read(tmp_path, 0)


def test_a_table_with_other_columns_is_no_trace(tmp_path: Path) -> None:
    trace.write(tmp_path, 0, pa.table({"step": [1]}))
    with pytest.raises(ValueError, match="is not a trace"):
        trace.read(tmp_path, 0)


def table_of(bytes_: list[int], categories: list[str] | None = None) -> pa.Table:
    """A trace of one storage after another, each a new one."""
    count = len(bytes_)
    return pa.table(
        {
            "step": pa.array([0] * count, pa.int32()),
            "phase": ["forward"] * count,
            "micro_batch": pa.array([0] * count, pa.int32()),
            "module": ["model"] * count,
            "op": ["mm.default"] * count,
            "category": categories or ["activations"] * count,
            "name": [""] * count,
            "storage": pa.array(range(count), pa.int32()),
            "bytes": bytes_,
            "saved": [0] * count,
            "nanoseconds": pa.array([None] * count, pa.int64()),
        }
    )


@pytest.mark.parametrize("peak_at", [0, 1, 4999, 9998])
def test_thinning_keeps_the_peak_and_both_ends(peak_at: int) -> None:
    deltas = [0] * 10_000
    deltas[peak_at], deltas[peak_at + 1] = 7, -6
    actual = points.drawn(points.of_table(table_of(deltas)))
    assert actual["events"] == 10_000
    assert len(actual["at"]) <= points.DRAWN + 3
    assert actual["categories"]["activations"][actual["peak"]] == 7
    assert actual["at"][actual["peak"]] == peak_at
    assert (actual["at"][0], actual["at"][-1]) == (0, 9_999)
    assert actual["categories"]["activations"][-1] == 1


def test_a_point_names_its_largest_holders_and_no_empty_one() -> None:
    actual = points.drawn(
        points.of_table(table_of([10, 20, -10], ["activations", "workspace", "activations"]))
    )
    last = actual["holders"][-1]
    assert [actual["names"][name] for name in last[::2]] == ["workspace: model: mm"]
    assert last[1::2] == [20]
