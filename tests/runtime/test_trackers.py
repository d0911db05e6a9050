"""A tracker that fails, is absent or was not wanted: a line, and the run goes on. Real runs: tests/distributed."""

import os
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from harness.record.record_file import read
from harness.runtime.trackers import Trackers
from tests.tracked import READERS

ROOT = Path(__file__).parents[2]


def test_a_tracker_that_fails_in_the_middle_is_said_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said: list[str] = []
    trackers = Trackers(["mlflow", "tensorboard"], tmp_path, said.append, "train tiny", {"seed": 0})
    trackers.start()
    trackers.log(1, {"loss": 2.0, "unknown": None})
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("alter table latest_metrics rename to gone")
    trackers.log(2, {"loss": 1.0})
    trackers.log(3, {"loss": 0.5})
    trackers.finish({"loss": 0.5})
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("alter table gone rename to latest_metrics")
    mlflow.end_run()  # else it would be ended with this process, and its database is then gone
    assert [line.partition(":")[0] for line in said] == [
        "tracker mlflow",
        "tracker tensorboard",
        "tracker mlflow gets no more figures",
    ]
    figures = READERS["tensorboard"](tmp_path).figures
    assert figures == {"loss": {1: 2.0, 2: 1.0, 3: 0.5}, "final/loss": {3: 0.5}}


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_the_command_that_shows_the_figures_can_be_copied_to_a_shell(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    directory, said = tmp_path / "a run #1", list[str]()
    directory.mkdir()
    trackers = Trackers([kind], directory, said.append)
    trackers.start()
    trackers.finish({"loss": 0.5})
    (line,) = said
    words = shlex.split(line.removeprefix(f"tracker {kind}: "))
    assert words[0] == kind
    assert Path(words[-1].removeprefix("sqlite:///")).exists()


def test_a_tracker_whose_environment_is_wrong_is_a_line_of_a_run_that_is_complete(tmp_path: Path) -> None:
    words = ["mode=train", "hardware=cpu", "precision=fp32", "train.steps=1", "train.sequence=16"]
    words += ["train.export=false", "train.validate_every=0", "hardware.bandwidth=1e10", "tracker=mlflow"]
    done = subprocess.run(
        [sys.executable, "-m", "harness", *words, f"hydra.run.dir={tmp_path}/run"],
        cwd=ROOT,
        env={**os.environ, "MLFLOW_TRACKING_URI": "no-such-scheme://nowhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("tracker")]
    assert line.startswith("tracker mlflow gets no more figures: ")
    assert "no-such-scheme" in line
    assert read(tmp_path / "run")["status"] == "complete"
    assert not [*(tmp_path / "run").glob("mlflow*")]


def test_a_run_that_is_refused_in_the_middle_has_failed_in_its_tracker(tmp_path: Path) -> None:
    words = ["mode=infer", "hardware=cpu", "precision=fp32", "generation.count=1", "generation.batch=1"]
    words += ["generation.max_new_tokens=2", "generation.cache=static", "generation.compile=true"]
    variables = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, "-m", "harness", *words, "tracker=mlflow", f"hydra.run.dir={tmp_path}/run"],
        cwd=ROOT,
        env={**variables, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    tracked = READERS["mlflow"](tmp_path / "run")
    assert tracked.state == "FAILED"
    assert done.stderr == f"harness: {tracked.failure}\n"
    assert "cannot be compiled" in done.stderr


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow", "sqlalchemy"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_run(tmp_path: Path, package: str) -> None:
    tracker = package if package in READERS else "mlflow"
    words = ["mode=train", f"tracker={tracker}", f"hydra.run.dir={tmp_path}/run"]
    code = f"import sys; sys.modules[{package!r}] = None; from harness.__main__ import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    remedy = f"{package} is not installed; install it with pip install 'harness[{tracker}]'"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"harness: tracker={tracker}: {remedy}\n"
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_imported_without_mlflow() -> None:
    code = (
        "import sys; from harness.runtime.imports import import_deepspeed; import_deepspeed(); "
        "print('mlflow' in sys.modules, 'deepspeed.autotuning.autotuner' in sys.modules); import mlflow"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False True"
