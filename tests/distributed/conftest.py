"""Runs of the product through its own launcher, each made once a session and looked at by many tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
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

NARROW = ("model.config.hidden_size=64", "model.config.intermediate_size=176")
"""A small model made smaller, where its width is nothing to the claim: a CPU without units for bf16 is slow in it."""

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


@contextmanager
def under_torchrun(*words: str) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """torchrun of `harness` and its two ranks, when they have a model; nothing of them is left at the end."""
    with subprocess.Popen(
        [*LAUNCHER, "--nproc-per-node=2", "-m", "harness", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as launcher:
        assert launcher.stdout is not None
        assert any("parameters" in line for line in launcher.stdout)
        ranks = psutil.Process(launcher.pid).children()
        try:
            yield launcher, ranks
        finally:
            for process in (*ranks, launcher):
                if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                    process.kill()


class Warm:
    """A torchrun of four ranks that waits for jobs: each forks from ranks that have imported everything."""

    def __init__(self, log: Path) -> None:
        self.log, self.done = log, 0
        self.store = TCPStore(
            "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=240)
        )
        script = Path(__file__).with_name("one_after_another.py")
        with log.open("w") as said:
            self.process = subprocess.Popen(
                [*LAUNCHER, "--nproc-per-node=4", str(script), str(self.store.port)],
                cwd=ROOT,
                # this checkout's, whatever is installed
                env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def run(
        self,
        words: Sequence[str],
        ranks: int = 2,
        code: int | Sequence[int] = 0,
        directory: Path | None = None,
    ) -> str:
        """What `harness` with `words` says on the first `ranks`, each of which must end with `code`, or with its own.

        With a `directory`, `words` are a script and its words, and it runs there.
        """
        number, before = self.done, self.log.stat().st_size
        self.done += 1
        job = {"words": [*map(str, words)], "ranks": ranks, "directory": directory and str(directory)}
        self.store.set(f"{number}/job", json.dumps(job))
        codes = [int(self.store.get(f"{number}/exit/{rank}")) for rank in range(ranks)]
        said = self.log.read_bytes()[before:].decode()
        assert codes == ([code] * ranks if isinstance(code, int) else [*code]), said[-4000:]
        return said

    def refused(self, words: Sequence[str], ranks: int = 2) -> str:
        """The one sentence with which all of the first `ranks` refuse `words`."""
        said = self.run(["hardware=cpu", PRECISION, *words], ranks, code=2)
        (sentence,) = [line for line in said.splitlines() if line.startswith("harness:")]
        assert "Traceback" not in said
        return sentence

    def close(self) -> None:
        """Let its ranks go."""
        self.store.set(f"{self.done}/job", "null")
        self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """The session's warm ranks."""
    ranks = Warm(tmp_path_factory.mktemp("ranks") / "log")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def launch(warm: Warm, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Launch:
    """A function of overrides to the finished run's directory; the same ones are run once, unless `again` differs."""
    runs: dict[tuple[str, ...], Path] = {}

    def run(*words: str, ranks: int = 2, again: int = 0) -> Path:
        key = (*words, str(ranks), str(again))
        if key not in runs:
            if "generation.cache=quantized" in words:
                request.getfixturevalue("quanto")
            directory = tmp_path_factory.mktemp("run") / "out"
            warm.run(["hardware=cpu", PRECISION, *RATED, *words, f"hydra.run.dir={directory}"], ranks)
            runs[key] = directory
        return runs[key]

    return run


def complete(directory: Path) -> dict[str, Any]:
    """The record of a run that must not have failed."""
    actual = record_file.read(directory)
    assert actual["status"] == "complete", actual["failure"]
    return actual


@pytest.fixture(scope="session")
def trained(launch: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """A function of overrides to the record of a quick training run with them."""

    def run(*words: str, again: int = 0) -> dict[str, Any]:
        return record_file.read(launch("mode=train", *QUICK, *words, again=again))

    return run
