"""A report says what the records say, opens without a network or an error, and runs nothing that a record has in it."""

import json
import subprocess
import sys
import xml.sax.saxutils
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest

from harness.__main__ import main
from harness.record import trace
from harness.record.record_file import FILE, read, write
from harness.record.schema import parse
from harness.report import PAGE, points

HOSTILE = "</script><script>window.hacked=1</script><b>"

Report = Callable[..., Path]


def report(directory: Path, *words: object) -> Path:
    """The directory of a report that must be made."""
    assert main(["report", *map(str, words), "-o", str(directory)]) == 0
    return directory


def changed(run: Path, directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A run with its record changed, without traces."""
    record = read(run)
    change(record)
    directory.mkdir()
    write(directory, parse(record, "it"))
    return directory


def test_the_page_has_every_run_and_asks_the_network_for_nothing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = report(tmp_path / "report", runs["train"], runs["infer"])
    assert capsys.readouterr().out == f"{result / PAGE}\n"
    text = (result / PAGE).read_text()
    assert '<option value="0">train tiny</option>' in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    for tag in ("<link", "<img", "<iframe", " src=", "@import"):
        assert tag not in text.partition('<script type="application/json"')[0]


def test_it_is_drawn_where_there_is_no_torch(runs: dict[str, Path], tmp_path: Path) -> None:
    without = "import sys; sys.modules.update(dict.fromkeys(('torch', 'deepspeed', 'transformers')))"
    forms = ["--perfetto", "--chakra", "--csv", "--parquet", "--markdown"]
    words = ["report", *map(str, runs.values()), "-o", str(tmp_path / "report"), *forms]
    script = f"{without}; from harness.__main__ import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report" / PAGE).exists()


def test_a_record_runs_nothing_in_the_page(runs: dict[str, Path], tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["model"]["name"] = HOSTILE
        record["environment"]["command"] = [HOSTILE]
        record["ranks"][0]["peak"]["where"]["module"] = HOSTILE
        record["config"][HOSTILE] = HOSTILE

    result = report(tmp_path / "report", changed(runs["train"], tmp_path / "run", change))
    text = (result / PAGE).read_text()
    assert HOSTILE not in text
    assert xml.sax.saxutils.escape(HOSTILE) in text


def test_all_of_it_needs_no_trace(runs: dict[str, Path], tmp_path: Path) -> None:
    bare = changed(runs["train"], tmp_path / "run", lambda record: None)
    result = report(tmp_path / "report", bare, "--csv", "--perfetto", "--markdown")
    assert (result / "phases.csv").exists()
    assert not (result / "events.csv").exists()
    assert json.loads((result / "perfetto.json").read_text())["traceEvents"] == []


def test_a_run_that_failed_before_it_measured_anything_says_why(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def change(record: dict[str, Any]) -> None:
        record |= {"status": "failed", "failure": {"rank": 1, "error": "no room"}, "ranks": []}

    failed = changed(runs["infer"], tmp_path / "run", change)
    text = (report(tmp_path / "alone", failed) / PAGE).read_text()
    assert "infer tiny failed on rank 1: no room; infer tiny has the accounting of 0 of its 2 ranks." in text
    text = (report(tmp_path / "beside", runs["train"], failed) / PAGE).read_text()
    assert "Not measured in one of them" in text
    assert "Only in training" not in text


def test_perfetto_has_the_bytes_of_each_category_and_every_phase(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    result = report(tmp_path / "report", runs["train"], "--perfetto")
    events = json.loads((result / "perfetto.json").read_text())["traceEvents"]
    counters = [event["args"] for event in events if event["ph"] == "C" and event["pid"] == 0]
    record = read(runs["train"])["ranks"][0]
    assert max(sum(each.values()) for each in counters) == record["peak"]["bytes"]
    assert counters[-1] == {name: measured["end"] for name, measured in record["categories"].items()}
    slices = {(event["args"]["step"], event["name"]) for event in events if event["ph"] == "X"}
    assert {(step, name) for step in (0, 1) for name in ("forward", "backward", "step")} <= slices
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_tables_have_a_row_for_each_phase_and_each_event(runs: dict[str, Path], tmp_path: Path) -> None:
    result = report(tmp_path / "report", runs["train"], runs["infer"], "--csv", "--parquet")
    phases = pyarrow.parquet.read_table(result / "phases.parquet")
    records = [read(run) for run in runs.values()]
    assert phases.num_rows == sum(len(rank["phases"]) for record in records for rank in record["ranks"])
    assert (
        pyarrow.csv.read_csv(result / "phases.csv").column("peak").to_pylist()
        == phases.column("peak").to_pylist()
    )
    events = pyarrow.parquet.read_table(result / "events.parquet")
    kept = [trace.read(run, rank["rank"]) for run in runs.values() for rank in read(run)["ranks"]]
    assert events.num_rows == sum(table.num_rows for table in kept if table is not None)
    assert set(events.column("run").to_pylist()) == {"train tiny", "infer tiny"}


def test_a_category_that_this_version_does_not_know_is_dropped_nowhere(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def change(record: dict[str, Any]) -> None:
        record["ranks"][0]["peak"]["categories"]["antimatter"] = 7
        record["ranks"][0]["phases"][0]["categories"]["antimatter"] = 7

    run = changed(runs["train"], tmp_path / "run", change)
    table = trace.read(runs["train"], 0)
    assert table is not None
    names = pyarrow.array(
        ["antimatter" if name == "optimizer" else name for name in table.column("category").to_pylist()]
    )
    renamed = table.set_column(table.column_names.index("category"), "category", names)
    trace.write(run, 0, renamed)
    result = report(tmp_path / "report", run, "--csv", "--perfetto")
    assert pyarrow.csv.read_csv(result / "phases.csv").column("antimatter").to_pylist()[0] == 7
    ends = [
        event["args"]
        for event in json.loads((result / "perfetto.json").read_text())["traceEvents"]
        if event["ph"] == "C"
    ]
    assert ends[-1]["antimatter"] > 0
    actual = points.drawn(points.of_table(renamed))["categories"]
    assert actual["antimatter"] == points.drawn(points.of_table(table))["categories"]["optimizer"]
    text = (result / PAGE).read_text()
    assert '"antimatter":7' in text


def test_tensorboard_reads_the_most_of_each_step(runs: dict[str, Path], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = report(tmp_path / "report", runs["train"], "--tensorboard")
    seen = EventAccumulator(str(result / "tensorboard"))
    seen.Reload()
    rank = read(runs["train"])["ranks"][0]
    most = max(phase["peak"] for phase in rank["phases"] if phase["step"] == 1)
    values = seen.Tensors("memory/total (MiB)")
    assert [each.step for each in values[:2]] == [0, 1]
    assert values[1].tensor_proto.float_val[0] == pytest.approx(most / 2**20, rel=1e-6)


def test_several_runs_are_named_by_what_they_are_in_every_export(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def other(record: dict[str, Any]) -> None:
        record["config"]["zero"]["stage"] = 1

    result = report(
        tmp_path / "report",
        *(runs["train"], changed(runs["train"], tmp_path / "run", other)),
        *("--tensorboard", "--perfetto", "--csv", "--markdown"),
    )
    assert {each.name for each in (result / "tensorboard").iterdir()} == {
        "0-train_tiny_zero=2",
        "1-train_tiny_zero=1",
    }
    about = json.loads((result / "perfetto-1.json").read_text())["otherData"]
    assert about == {"run": "train tiny zero=1", "directory": str(tmp_path / "run")}
    phases = pyarrow.csv.read_csv(result / "phases.csv")
    assert set(phases.column("run").to_pylist()) == {"train tiny zero=2", "train tiny zero=1"}
    assert str(tmp_path / "run") in phases.column("directory").to_pylist()
    assert "## train tiny zero=1\n" in (result / "report.md").read_text()


def test_markdown_says_what_explain_says_and_breaks_no_page(runs: dict[str, Path], tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["model"]["name"] = HOSTILE

    result = report(
        tmp_path / "report", changed(runs["train"], tmp_path / "run", change), runs["infer"], "--markdown"
    )
    text = (result / "report.md").read_text()
    assert "<script>" not in text.replace("\\<script>", "")
    assert "at its peak" in text
    assert "| parameters |" in text.replace("&emsp;", "")


def test_a_rehearsal_beside_its_run_is_equal_or_says_where_not(runs: dict[str, Path], tmp_path: Path) -> None:
    def real(record: dict[str, Any]) -> None:
        record["world"]["kind"] = "torchrun"
        record["config"]["world"]["kind"] = "torchrun"

    def other(record: dict[str, Any]) -> None:
        real(record)
        record["ranks"][0]["categories"]["optimizer"]["peak"] += 1

    same = changed(runs["train"], tmp_path / "same", real)
    text = (report(tmp_path / "one", runs["train"], same) / PAGE).read_text()
    assert "are equal to the byte" in text
    apart = changed(runs["train"], tmp_path / "apart", other)
    text = (report(tmp_path / "two", runs["train"], apart) / PAGE).read_text()
    assert "differ in 1 of" in text
    assert "optimizer, peak" in text
    text = (report(tmp_path / "three", runs["infer"], same) / PAGE).read_text()
    assert "Rehearsed beside real" not in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema": "harness.record/2"}', "has schema 'harness.record/2', and this version reads"),
        ('{"schema": "harness.rec', "cannot be read"),
        ("[]", "has schema None"),
    ],
)
def test_what_is_no_record_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    (tmp_path / FILE).write_text(content)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_a_corrupt_trace_is_a_sentence(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = changed(runs["train"], tmp_path / "run", lambda record: None)
    (run / trace.DIRECTORY).mkdir()
    (run / trace.DIRECTORY / "rank-0.parquet").write_bytes(b"PAR1")
    assert main(["report", str(run), "-o", str(tmp_path / "report")]) == 2
    assert "rank-0.parquet is not a trace" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_a_sentence(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", str(runs["train"]), "-o", str(tmp_path / "file" / "in")]) == 2
    assert "it cannot be written: Not a directory" in capsys.readouterr().err
