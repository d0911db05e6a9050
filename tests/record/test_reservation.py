"""What a rehearsed GPU's allocator reserves: in the record, in the tools that read it, in torch's own snapshot."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.cuda import _memory_viz

from harness.__main__ import main
from harness.advice.explain import explain
from harness.analysis.compare import compare
from harness.analysis.summary import show
from harness.check import baseline
from harness.check.verdict import judge
from harness.record import record_file
from harness.record.schema import parse
from harness.report.content import _rank

SMALL = (
    *("mode=train", "model=tiny", "model.config.num_hidden_layers=1", "train.steps=2", "train.sequence=32"),
    *(
        "precision=bf16",
        "model.attention=sdpa",
        "train.export=false",
        "world=rehearsed",
        "world.size=1",
        "zero=1",
    ),
)
GPU = (*SMALL, "hardware=h100-sxm")
FIGURES = {"reserved", "slack", "split", "segments", "retries", "settings", "exhausted"}


def run(directory: Path, *words: str) -> dict[str, Any]:
    """The record of a rehearsal in `directory`."""
    assert main([*words, f"hydra.run.dir={directory}"]) == 0
    record: dict[str, Any] = json.loads((directory / "record.json").read_text())
    return record


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu") / "out"
    run(directory, *GPU, "ledger.snapshot=true")
    return directory


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cpu") / "out"
    run(directory, *SMALL, "hardware=cpu")
    return directory


def test_a_record_has_what_is_reserved_on_a_gpu_and_nothing_of_it_on_a_cpu(gpu: Path, cpu: Path) -> None:
    (rank,) = record_file.read(gpu)["ranks"]
    allocator = rank["allocator"]
    assert allocator.keys() >= FIGURES
    assert allocator["reserved"] == rank["peak"]["reserved"] >= rank["peak"]["allocated"]
    assert 0 <= allocator["split"] <= allocator["slack"] < allocator["reserved"]
    assert (allocator["source"], allocator["settings"], allocator["exhausted"]) == (None, "", None)
    (rank,) = record_file.read(cpu)["ranks"]
    assert FIGURES.isdisjoint(rank["allocator"])


def test_a_record_that_is_read_is_written_the_same(gpu: Path) -> None:
    assert record_file.text(parse(record_file.read(gpu), "it")) == (gpu / "record.json").read_text()


def test_torch_reads_a_rehearsed_snapshot_and_adds_up_its_segments(gpu: Path) -> None:
    taken = pickle.loads((gpu / "snapshot-0.pickle").read_bytes())
    held = sum(segment["total_size"] for segment in taken["segments"])
    reserved = record_file.read(gpu)["ranks"][0]["allocator"]["reserved"]
    assert 0 < held <= reserved
    assert f"total_reserved: {held / 2**20:.1f}MiB" in _memory_viz.segsum(taken)
    grown = {"segment_alloc": 1, "segment_free": -1}
    now = most = 0
    for entry in taken["device_traces"][0]:
        now += grown.get(entry["action"], 0) * entry["size"]
        most = max(most, now)
    assert (most, now) == (reserved, held)


def test_tools_show_it_where_it_is_known_and_are_silent_elsewhere(gpu: Path, cpu: Path) -> None:
    record = record_file.read(gpu)
    assert "reserved, in segments" in show(record)
    assert "slack" in show(record)
    assert show(record).count("\n  kernel ") == 1
    assert "reserved" not in show(record_file.read(cpu))
    assert "reserved, in segments" in compare(gpu, cpu)
    assert "reserved" not in compare(cpu, cpu)
    assert "reserved" in {finding.kind for finding in explain(parse(record, "it"))}
    assert "reserved" not in {finding.kind for finding in explain(parse(record_file.read(cpu), "it"))}
    rank = parse(record, "it").ranks[0]
    assert (_rank(rank)["reserved"], _rank(rank)["slack"]) == (rank.allocator.reserved, rank.allocator.slack)


def test_a_baseline_holds_what_is_reserved_where_both_have_it(gpu: Path, cpu: Path, tmp_path: Path) -> None:
    measured = baseline.of(parse(record_file.read(gpu), "it"), "it")
    file = tmp_path / "gpu.json"
    baseline.write(file, measured)
    assert baseline.text(baseline.read(file)) == baseline.text(measured)
    (ranks,) = measured.ranks
    assert ranks.reserved is not None
    config = record_file.read(gpu)["config"]

    def judged(reserved: int | None) -> int:
        fields: dict[str, Any] = {name: getattr(measured, name) for name in baseline.Baseline.model_fields}
        other = baseline.Baseline(**{**fields, "ranks": [ranks.model_copy(update={"reserved": reserved})]})
        return judge(file, measured, other, config, {}).code

    assert [judged(each) for each in (ranks.reserved, None, ranks.reserved + 512)] == [0, 0, 1]
    assert '"reserved"' not in baseline.text(baseline.of(parse(record_file.read(cpu), "it"), "it"))


def test_where_a_run_does_not_fit_is_in_its_record_and_said(tmp_path: Path) -> None:
    record = run(
        tmp_path / "out", *GPU, f"hardware.memory={60 * 2**20}", "hardware.allocator=max_split_size_mb:64"
    )
    allocator = record["ranks"][0]["allocator"]
    assert allocator["settings"] == "max_split_size_mb:64"
    assert allocator["retries"] == 1
    assert allocator["exhausted"]["bytes"] > 0
    assert allocator["exhausted"]["phase"]
    assert "does not fit: " in show(record)
    findings = {finding.kind: finding for finding in explain(parse(record, "it"))}
    assert findings["exhausted"].bytes == allocator["exhausted"]["bytes"]


def test_explain_says_which_setting_would_reserve_less(gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(gpu), "--json"]) == 0
    findings = {each["kind"]: each for each in json.loads(capsys.readouterr().out)}
    assert "agreement" not in findings
    said = findings["allocator"]
    if said["bytes"]:
        assert said["sentence"].startswith("With PYTORCH_ALLOC_CONF=")
        change = said["sentence"].split("=", 1)[1].split(" ")[0]
        less = run(gpu.parent / "less", *GPU, f"hardware.allocator={change}")
        before = record_file.read(gpu)["ranks"][0]["allocator"]["reserved"]
        assert before - less["ranks"][0]["allocator"]["reserved"] == said["bytes"]
    else:
        assert said["sentence"].startswith("No other setting")
