"""The gate between a run and its rehearsal: one baseline is held by both, to the byte, until a knob is another."""

import json
import re
from pathlib import Path

import pytest

from harness.__main__ import main
from tests.distributed.conftest import PRECISION, QUICK, RATED, Launch

WORDS = ("mode=train", "model=tiny", *QUICK, "model.config.num_hidden_layers=2", "train.steps=2", "zero=2")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline that rehearsing WORDS on two ranks makes."""
    run, file = (
        tmp_path_factory.mktemp("rehearsed") / "run",
        tmp_path_factory.mktemp("profiles") / "zero2.json",
    )
    words = [
        "hardware=cpu",
        PRECISION,
        *RATED,
        *WORDS,
        "world=rehearsed",
        "world.size=2",
        f"hydra.run.dir={run}",
    ]
    assert main(words) == 0
    assert main(["check", str(run), "--baseline", str(file), "--update"]) == 0
    return file


def test_a_real_run_holds_the_baseline_of_its_rehearsal_to_the_byte(
    launch: Launch, rehearsed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(launch(*WORDS)), "--baseline", str(rehearsed)]) == 0
    reported = capsys.readouterr().out
    assert reported.startswith("zero2   holds   ranks 0-1: ")


def test_a_rehearsal_holds_the_baseline_of_a_real_run(launch: Launch, tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    assert main(["check", str(launch(*WORDS)), "--baseline", str(file), "--update"]) == 0
    tree = json.loads(file.read_text())
    assert tree["config"] == ["hardware=cpu", PRECISION, *RATED, *WORDS]
    assert tree["ranks"][0]["allocator"] is not None
    assert main(["check", "--baseline", str(file)]) == 0


def test_a_run_with_one_knob_changed_fails_and_the_category_and_the_knob_are_named(
    launch: Launch, rehearsed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch(*WORDS, "zero.reduce_bucket_size=1000000")
    assert main(["check", str(run), "--baseline", str(rehearsed)]) == 1
    reported = " ".join(capsys.readouterr().out.split())
    assert "communication, peak" in reported
    assert "another config: zero.reduce_bucket_size=1000000, the baseline's 5000000" in reported
    assert "activations, peak" not in reported


def test_a_run_that_moves_more_fails_and_says_what_moves_it(
    rehearsed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["hardware=cpu", PRECISION, *RATED, *WORDS, "train.accumulation=2", "zero=3"]
    assert main([*words, "world=rehearsed", "world.size=2", f"hydra.run.dir={tmp_path}/run"]) == 0
    assert main(["check", f"{tmp_path}/run", "--baseline", str(rehearsed)]) == 1
    reported = " ".join(capsys.readouterr().out.split())
    named = re.search(
        r"rank 1: all-gather in forward over host-memory: ([0-9,]+) B, the baseline's 0 B, most", reported
    )
    assert named is not None
    assert int(named[1].replace(",", "")) > 2**20
    assert "zero.stage=3, the baseline's 2" in reported
