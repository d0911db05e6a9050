"""Records and traces that no run leaves: every tool reads them, or refuses them by a sentence; nothing else is read."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.__main__ import main
from harness.record import trace
from harness.record.places import runs_in
from tests import hostile

COUNT = 8
"""Mutations of each file. `python -m tests.benchmarks.hostile` draws 1,500."""

Tree = dict[str, Any]
Said = Callable[..., str]


@pytest.mark.parametrize("name", [*hostile.MUTATED, "trace"])
def test_a_mutated_file_is_read_or_refused_by_a_sentence(runs: dict[str, Path], name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong = [
        f"{number}: {command}: {reason}"
        for number in range(COUNT)
        for command, reason, _ in hostile.carried_out(runs, name, number)
        if reason is not None
    ]
    assert wrong == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: a GiB


@pytest.fixture
def said(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """What a tool says of the record of a run after a change to it."""

    def say(name: str, change: Callable[[Tree], Any], *command: str, code: int = 0) -> str:
        tree = json.loads((runs[name] / "record.json").read_text())
        change(tree)
        (tmp_path / "record.json").write_text(json.dumps(tree))
        assert main([command[0], str(tmp_path), *command[1:]]) == code
        out = capsys.readouterr()
        return out.err if code else out.out

    return say


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ceilings.bandwidth", 1e-320),
        ("ceilings.flops", float("inf")),
        ("performance.tokens_per_second", float("nan")),
        ("performance.step_seconds", -1.0),
        ("performance.latency.between_tokens_seconds.p50", 10**400),
        ("pipeline.bubble", 7.0),
        ("pipeline.stages", 0),
        ("world.size", 2**31 - 1),
        ("ranks.0.rank", 2**31 - 1),
    ],
)
def test_a_figure_that_cannot_be_is_refused_by_its_field(said: Said, path: str, value: float) -> None:
    def change(tree: Tree) -> None:
        node: Any = tree
        *parts, name = path.split(".")
        for part in parts:
            node = node[int(part)] if part.isdecimal() else node.setdefault(part, {})
        node[name] = value

    sentence = said("training", change, "roofline", code=2)
    assert f"is not a complete record: {path}=" in sentence


def test_a_rank_that_is_there_twice_is_refused(said: Said) -> None:
    sentence = said(
        "training", lambda tree: tree["ranks"].append(tree["ranks"][0]), "explain", "--no-rehearsal", code=2
    )
    assert "should have each rank once, and rank 0 is there twice" in sentence


@pytest.mark.parametrize("key", ["config", "model", "schema"])
def test_a_tree_that_is_too_deep_is_refused(said: Said, key: str) -> None:
    deep = hostile.nested(dict, 900)
    assert (
        "record.json" in said("training", lambda tree: tree.update({key: deep}), "roofline", code=2)
        or key != "schema"
    )


def test_a_peak_of_nothing_with_categories_has_no_share(said: Said) -> None:
    def change(tree: Tree) -> None:
        tree["ranks"] = tree["ranks"][:1]
        tree["ranks"][0]["peak"]["bytes"] = 0

    assert "holds 0 B at its peak" in said("training", change, "explain", "--no-rehearsal")


def test_stages_of_no_layers_share_nothing(said: Said) -> None:
    def change(tree: Tree) -> None:
        tree["pipeline"]["split"] = [0, 0]

    assert "forward" in said("rehearsal", change, "roofline", "--hardware", "rtx4090")


def test_a_pipeline_without_its_first_stage_is_explained(said: Said) -> None:
    def change(tree: Tree) -> None:
        for rank in tree["ranks"]:
            rank["stage"] += 3

    assert "at its peak" in said("rehearsal", change, "explain", "--no-rehearsal")


def test_a_replica_needs_all_its_ranks(said: Said, runs: dict[str, Path]) -> None:
    def change(tree: Tree) -> None:
        tree["config"]["pipeline"]["stages"] = 64

    other = str(runs["another batch"])
    assert "has fewer ranks than its stages" in said("generation", change, "batching", other, code=2)


@pytest.mark.parametrize("ledger", [7, None, {"steps": "many"}, {"steps": [1]}])
def test_a_baseline_is_compared_with_a_run_of_an_odd_config(said: Said, tmp_path: Path, ledger: Any) -> None:
    file = tmp_path / "baseline.json"
    arguments = "check", "--baseline", str(file)
    said("training", lambda tree: None, *arguments, "--update")
    assert "baseline" in said("training", lambda tree: tree["config"].update(ledger=ledger), *arguments)


def test_layers_that_are_no_number_are_no_layers(said: Said) -> None:
    def change(tree: Tree) -> None:
        tree["config"]["checkpointing"]["mode"] = "full"
        tree["config"]["model"]["config"]["num_hidden_layers"] = "many"

    assert "at its peak" in said("training", change, "explain", "--no-rehearsal")


def test_a_name_that_is_too_long_for_a_path_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "x" * 5000]) == 2
    assert "cannot be read: File name too long" in capsys.readouterr().err


def test_a_record_or_trace_that_leads_out_of_its_run_is_not_read(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run, outside = tmp_path / "run", runs["training"]
    run.mkdir()
    (run / "record.json").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="leads out of the run's directory"):
        trace_or_record(run)
    (run / "record.json").unlink()
    os.mkfifo(run / "record.json")
    with pytest.raises(ValueError, match="is no file"):
        trace_or_record(run)
    (run / "record.json").unlink()
    (run / "record.json").write_bytes((outside / "record.json").read_bytes())
    (run / "trace").symlink_to(outside / "trace")
    with pytest.raises(ValueError, match="leads out of the run's directory"):
        trace.read(run, 0)
    assert runs_in(run) == [run]


def trace_or_record(run: Path) -> Tree:
    from harness import read

    return read(run)


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("bytes", None, "bytes is null in 1 of"),
        ("op", None, "op is null in 1 of"),
        ("saved", 2**62, "saved has a value that is no number of bytes"),
        ("storage", None, "a category without a storage"),
    ],
)
def test_an_event_that_cannot_be_is_refused_by_its_column(
    runs: dict[str, Path], tmp_path: Path, column: str, value: Any, sentence: str
) -> None:
    table = trace.read(runs["training"], 0)
    assert table is not None
    index = table.column_names.index(column)
    values = table.column(index).to_pylist()
    values[next(number for number, each in enumerate(table.column("category").to_pylist()) if each)] = value
    (tmp_path / "trace").mkdir()
    pq.write_table(
        table.set_column(index, column, pa.array(values, table.schema.types[index])),
        tmp_path / "trace/rank-0.parquet",
    )
    with pytest.raises(ValueError, match=sentence):
        trace.read(tmp_path, 0)


NAME = "=<b>&amp;|`x`*[a](b)\u202e\x1b[2J/../n"


def test_names_with_markup_and_control_characters_are_text_in_every_export(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads((runs["training"] / "record.json").read_text())
    tree["model"]["name"] = tree["mode"] = NAME
    tree["config"][NAME] = NAME
    for phase in tree["ranks"][0]["phases"]:
        phase["categories"] |= {"run": 1, NAME: 2}
    run = tmp_path / "run"
    run.mkdir()
    (run / "record.json").write_text(json.dumps(tree))
    other, output = str(runs["training"]), tmp_path / "out"
    assert main(["report", str(run), other, "-o", str(output), *hostile.FORMS]) == 0
    assert main(["compare", str(run), other, "--markdown"]) == 0
    assert "".join(capsys.readouterr().out.split("\n")).isprintable()
    for file in (output / "report.md", output / "phases.csv"):
        assert "".join(file.read_text().split("\n")).isprintable()
    markdown, page = (output / "report.md").read_text(), (output / "index.html").read_text()
    assert r"\<b>&amp;amp;\|\`x\`\*\[a\]" in markdown
    assert "<b>&amp;|" not in page
    assert "\x1b" not in page
    header, first, *_ = (output / "phases.csv").read_text().splitlines()
    assert '"run (category)"' in header
    assert first.startswith("\"'=<b>")
    inside = [each for each in output.rglob("*") if each.is_file()]
    assert all(each.resolve().is_relative_to(output.resolve()) for each in inside)
    assert len(list((output / "tensorboard").iterdir())) == 2
