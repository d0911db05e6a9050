"""Runs of the product through its own launcher, each made once a session and looked at by many tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from harness.record import record_file

ROOT = Path(__file__).parents[2]
QUICK = (
    "train.steps=3",
    "train.sequence=64",
    "train.micro_batch=2",
    "train.validate_every=0",
    "train.export=false",
)
"""Three small steps, all of them under the exact ledger."""

RATED = ("hardware.bandwidth=1e10",)
"""A machine's rate is given: a quarter of a quick run would be its measuring."""

PRECISION = "precision=fp32"
"""Where a test says nothing: every CPU has units for it, and a test that is about bf16 says so."""

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone")

Run = subprocess.CompletedProcess[str]
Launch = Callable[..., Path]


def torchrun(words: Sequence[str], ranks: int = 2, timeout: float = 240) -> Run:
    """`harness` with `words` on `ranks` processes of this machine."""
    return subprocess.run(
        [*LAUNCHER, f"--nproc-per-node={ranks}", "-m", "harness", "hardware=cpu", PRECISION, *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


class Warm:
    """A torchrun that waits for words: each run forks from ranks that have imported everything."""

    def __init__(self, ranks: int, log: Path) -> None:
        self.ranks, self.log, self.done = ranks, log, 0
        self.store = TCPStore(
            "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=240)
        )
        script = Path(__file__).with_name("one_after_another.py")
        with log.open("w") as said:
            self.process = subprocess.Popen(
                [*LAUNCHER, f"--nproc-per-node={ranks}", str(script), str(self.store.port)],
                cwd=ROOT,
                # this checkout's, whatever is installed
                env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def run(self, words: Sequence[str]) -> None:
        """`harness` with `words` on every rank, which must end well."""
        number, before = self.done, self.log.stat().st_size
        self.done += 1
        self.store.set(f"{number}/words", json.dumps([*words]))
        codes = [int(self.store.get(f"{number}/exit/{rank}")) for rank in range(self.ranks)]
        assert codes == [0] * self.ranks, self.log.read_bytes()[before:].decode()[-4000:]

    def close(self) -> None:
        """Let its ranks go."""
        self.store.set(f"{self.done}/words", "null")
        self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Warm]]:
    """A function of a number of ranks to the one torchrun that has so many."""
    running: dict[int, Warm] = {}

    def find(ranks: int) -> Warm:
        if ranks not in running:
            running[ranks] = Warm(ranks, tmp_path_factory.mktemp("ranks") / f"{ranks}.log")
        return running[ranks]

    yield find
    for each in running.values():
        each.close()


@pytest.fixture(scope="session")
def launch(warm: Callable[[int], Warm], tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """A function of overrides to the finished run's directory; the same ones are run once, unless `again` differs."""
    runs: dict[tuple[str, ...], Path] = {}

    def run(*words: str, ranks: int = 2, again: int = 0) -> Path:
        key = (*words, str(ranks), str(again))
        if key not in runs:
            directory = tmp_path_factory.mktemp("run") / "out"
            warm(ranks).run(["hardware=cpu", PRECISION, *RATED, *words, f"hydra.run.dir={directory}"])
            runs[key] = directory
        return runs[key]

    return run


def complete(directory: Path) -> dict[str, Any]:
    """The record of a run that must not have failed."""
    found = record_file.read(directory)
    assert found["status"] == "complete", found["failure"]
    return found


@pytest.fixture(scope="session")
def trained(launch: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """A function of overrides to the record of a quick training run with them."""

    def run(*words: str, again: int = 0) -> dict[str, Any]:
        return record_file.read(launch("mode=train", *QUICK, *words, again=again))

    return run
