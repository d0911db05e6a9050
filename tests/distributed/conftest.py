"""Runs of the product through its own launcher, each made once a session and looked at by many tests."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import record

ROOT = Path(__file__).parents[2]
QUICK = (
    "train.steps=3",
    "train.sequence=64",
    "train.micro_batch=2",
    "train.validate_every=0",
    "train.export=false",
)
"""Three small steps, all of them under the exact ledger."""

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone")

Run = subprocess.CompletedProcess[str]


def torchrun(words: Sequence[str], ranks: int = 2, timeout: float = 240) -> Run:
    """`harness` with `words` on `ranks` processes of this machine."""
    return subprocess.run(
        [*LAUNCHER, f"--nproc-per-node={ranks}", "-m", "harness", "hardware=cpu", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def run_each(runs: Sequence[Sequence[str]], places: Sequence[Path], ranks: int, timeout: float = 600) -> None:
    """`harness` with each of `runs`' words, one after another under one torchrun, into `places`."""
    listed = places[0].parent / "runs.json"
    pairs = zip(runs, places, strict=True)
    listed.write_text(json.dumps([[*words, f"hydra.run.dir={place}"] for words, place in pairs]))
    script = Path(__file__).with_name("one_after_another.py")
    result = subprocess.run(
        [*LAUNCHER, f"--nproc-per-node={ranks}", str(script), str(listed)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def complete(directory: Path) -> dict[str, Any]:
    """The record of a run that must not have failed."""
    found = record.read(directory)
    assert found["status"] == "complete", found["failure"]
    return found


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function of overrides to the finished run's directory; the same ones are run once, unless `again` differs."""
    runs: dict[tuple[str, ...], Path] = {}

    def run(*words: str, ranks: int = 2, again: int = 0) -> Path:
        key = (*words, str(ranks), str(again))
        if key not in runs:
            directory = tmp_path_factory.mktemp("run") / "out"
            result = torchrun([*words, f"hydra.run.dir={directory}"], ranks)
            assert result.returncode == 0, result.stderr[-4000:]
            runs[key] = directory
        return runs[key]

    return run


@pytest.fixture(scope="session")
def trained(launch: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """A function of overrides to the record of a quick training run with them."""

    def run(*words: str, again: int = 0) -> dict[str, Any]:
        return record.read(launch("mode=train", *QUICK, *words, again=again))

    return run
