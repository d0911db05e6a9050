"""`harness traffic`: what a step, a batch and a token move, as their records have it."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.analysis.moves.transfers import members

Tree = dict[str, Any]


def tree_of(run: Path) -> Tree:
    tree: Tree = json.loads((run / "record.json").read_text())
    return tree


@pytest.fixture
def changed(runs: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a run's record after a change to it."""

    def copy(name: str, change: Callable[[Tree], Any]) -> Path:
        tree = tree_of(runs[name])
        change(tree)
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(tree))
        return tmp_path / name

    return copy


def report(capsys: pytest.CaptureFixture[str], *runs: Path) -> list[Tree]:
    assert main(["traffic", *map(str, runs), "--json"]) == 0
    documents: list[Tree] = json.loads(capsys.readouterr().out)
    return documents


def without_traffic(tree: Tree) -> None:
    for rank in tree["ranks"]:
        rank["traffic"] = None


def test_the_rows_add_up_to_the_last_step_of_the_rank_that_moves_most(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    [document] = report(capsys, runs["rehearsal"])
    by_rank: Counter[int] = Counter()
    for rank in tree_of(runs["rehearsal"])["ranks"]:
        for row in rank["traffic"]:
            if row["step"] == 1 and row["phase"] in ("data", "forward", "backward", "step"):
                by_rank[rank["rank"]] += row["bytes"]
    traffic = document["traffic"]
    assert by_rank[traffic["rank"]] == max(by_rank.values()) > 0
    assert sum(row["bytes"] for row in traffic["rows"]) == by_rank[traffic["rank"]]
    assert sum(traffic["links"].values()) == by_rank[traffic["rank"]]
    assert sum(each["bytes"] for each in traffic["largest"]) + traffic["unnamed"] <= by_rank[traffic["rank"]]


def test_a_token_is_the_decode_over_its_forward_passes(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def add(tree: Tree) -> None:
        row = {"step": 1, "micro_batch": 0, "operation": "all-reduce", "link": "network", "calls": 3}
        last = max(phase["step"] for phase in tree["ranks"][0]["phases"] if phase["phase"] == "decode")
        tree["ranks"][0]["traffic"] = [
            {**row, "step": last, "phase": "decode", "bytes": 3000},
            {**row, "step": last, "phase": "prefill", "bytes": 70},
        ]

    [document] = report(capsys, changed("generation", add))
    assert document["traffic"]["token"] == {
        "passes": 3,
        "links": {"network": 1000},
    }  # 4 tokens: prefill gives one
    assert document["traffic"]["links"] == {"network": 3070}


def test_training_and_inference_are_set_side_by_side(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["traffic", str(runs["training"]), str(runs["generation"])]) == 0
    said = capsys.readouterr().out
    assert "a step of rank 0 of 2, which moves most" in said
    assert "backward, all-reduce" in said
    assert "train tiny   infer tiny" in said
    assert "outside of a step, setup: host-memory" in said
    assert "world.per_node=2: assumed" in said


def test_a_run_without_traffic_is_null_beside_another_and_alone_a_sentence(
    runs: dict[str, Path], changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    none = changed("training", without_traffic)
    assert [each["traffic"] is None for each in report(capsys, none, runs["rehearsal"])] == [True, False]
    assert main(["traffic", str(none)]) == 2
    assert capsys.readouterr().err == f"harness: {none}: its record has no traffic; nothing counted it\n"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tree: tree["config"]["ledger"].update(mode="off"), "ledger=off counts none"),
        (lambda tree: tree.update(ranks=[]), "none of its ranks left its figures"),
        (
            lambda tree: [each.pop("traffic") for each in tree["ranks"]],
            "a run of this version counts it",
        ),
    ],
)
def test_it_says_why_there_is_no_traffic(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str], change: Callable[[Tree], Any], why: str
) -> None:
    def both(tree: Tree) -> None:
        without_traffic(tree)
        change(tree)

    assert main(["traffic", str(changed("training", both))]) == 2
    assert capsys.readouterr().err.endswith(f"its record has no traffic; {why}\n")


def test_what_was_not_counted_is_said(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    gap = "all-reduce is not in the figures of traffic: the ledger could not read it (KeyError: 1)"

    def add(tree: Tree) -> None:
        for rank in tree["ranks"]:
            rank["unseen"] = ["not known and in no figure: what kernels of f take beside their results", gap]

    run = changed("training", add)
    assert report(capsys, run)[0]["traffic"]["gaps"] == [gap]
    assert main(["traffic", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"not counted: {gap}" in said
    assert "what kernels of f take" not in said


@pytest.mark.parametrize(
    "group", ["5-1:0", "0-99999999999:1", "1-2-3", "0,", "-4", "a", "0-7:x", "0,10485760"]
)
def test_a_group_that_is_none_is_refused(group: str) -> None:
    with pytest.raises(ValueError, match="not a group of ranks"):
        members(group)


@pytest.mark.parametrize(
    ("group", "ranks"),
    [("", []), ("3", [3]), ("0-3", [0, 1, 2, 3]), ("0-56:8", [*range(0, 57, 8)]), ("0,3,4", [0, 3, 4])],
)
def test_a_group_is_read(group: str, ranks: list[int]) -> None:
    assert [*members(group)] == ranks


def test_it_writes_the_traces_that_a_report_writes(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs["rehearsal"])
    assert main(["traffic", run, "--chakra", str(tmp_path / "alone")]) == 0
    assert main(["report", run, "-o", str(tmp_path / "page"), "--chakra"]) == 0
    alone, beside = (sorted((tmp_path / name / "chakra").iterdir()) for name in ("alone", "page"))
    assert [file.name for file in alone] == [file.name for file in beside]
    assert [file.read_bytes() for file in alone] == [file.read_bytes() for file in beside]
    (tmp_path / "file").touch()
    assert main(["traffic", run, "--chakra", str(tmp_path / "file")]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err
