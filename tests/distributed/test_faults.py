"""What a run promises when something fails: who is blamed, in which sentence, and that nothing is left.

Each row of the README's table is a test here. `faulty.py` brings faults, at the points of `harness/runtime/faults.py`.
"""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.record import record_file
from harness.runtime import failure
from harness.training import checkpoint
from tests.distributed.conftest import LAUNCHER, NARROW, PRECISION, QUICK, RATED, ROOT, Warm, under_torchrun

FAULTY = Path(__file__).with_name("faulty.py")
SMALL = (
    "hardware=cpu",
    PRECISION,
    *RATED,
    "mode=train",
    *QUICK,
    *NARROW,
    "train.steps=5",
    "train.micro_batch=1",
)
ENDLESS = (*SMALL, "train.steps=100000", "train.sequence=16", "ledger.steps=1")


def faulty(
    warm: Warm, fault: str, out: Path, *words: str, code: int | tuple[int, ...] = 3
) -> tuple[dict[str, Any], str]:
    """The record of a run on two warm ranks with a fault, and its one sentence."""
    words = (str(FAULTY), *fault.split(), *SMALL, f"hydra.run.dir={out}", *words)
    said = warm.run(words, code=code, directory=ROOT)
    assert "Traceback" not in said
    nothing_partial(out)
    sentences = [line for line in said.splitlines() if line.startswith("harness: ")]
    assert len(sentences) <= 1, sentences
    return (record_file.read(out) if out.exists() else {}), "".join(sentences).removeprefix("harness: ")


def nothing_partial(out: Path) -> None:
    """No file in `out` is a part of one."""
    assert not [*out.rglob("*.partial"), *out.rglob("*.tmp*")]


def test_ranks_that_are_all_killed_leave_a_record_of_where_they_were(warm: Warm, tmp_path: Path) -> None:
    record, sentence = faulty(warm, "noted forward 3 -", tmp_path / "out", code=-signal.SIGKILL)
    assert record["failure"] == {
        "rank": None,
        "where": {"step": 3, "phase": "forward", "micro_batch": 0},
        "error": "the run ended before it could say why",
    }
    assert record["ranks"][0]["peak"]["bytes"] > 0  # as of the end of the exact steps
    assert sentence == ""


def test_sigterm_to_all_ranks_is_what_ended_the_run_and_no_rank_is_blamed(warm: Warm, tmp_path: Path) -> None:
    record, sentence = faulty(warm, "term-hang forward 3 -", tmp_path / "out")
    assert sentence == "the run stopped in step 3, forward of micro-batch 0: ended by SIGTERM"
    assert record["failure"] == {
        "rank": None,
        "stage": None,
        "where": {"step": 3, "phase": "forward", "micro_batch": 0},
        "error": "ended by SIGTERM",
        "shortage": None,
    }
    assert [rank["rank"] for rank in record["ranks"]] == [0]
    assert len(record["training"]["losses"]) == 3


def test_a_signal_to_one_rank_lets_all_save_after_the_same_step(warm: Warm, tmp_path: Path) -> None:
    words = ("train.save_on_term=true", "train.steps=100000")
    record, sentence = faulty(warm, "term forward 1 1", tmp_path / "out", *words, code=75)
    (directory,) = (tmp_path / "out/state").iterdir()
    _, manifest, _ = checkpoint.newest_whole(tmp_path / "out")
    steps = manifest["step"]
    assert directory.name == f"step-{steps:08}"
    assert record["failure"]["error"].endswith(f"; its state after step {steps} is saved")
    assert record["failure"]["rank"] is None
    assert sentence.startswith(f"the run stopped in step {steps - 1}, ")
    assert len(record["training"]["losses"]) == steps


def test_torchrun_that_is_ended_lets_its_ranks_save_and_the_run_goes_on(warm: Warm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with under_torchrun(*ENDLESS, "train.save_on_term=true", f"hydra.run.dir={out}") as (launcher, ranks):
        launcher.send_signal(signal.SIGTERM)
        _, said = launcher.communicate(timeout=60)
        assert not any(rank.is_running() for rank in ranks), said
    failed = record_file.read(out)
    _, manifest, skipped = checkpoint.newest_whole(out)
    steps = manifest["step"]
    assert failed["failure"]["error"] == f"ended by SIGTERM; its state after step {steps} is saved", said
    assert json.loads((out / failure.CLAIM).read_text())["code"] == 75
    assert (skipped, launcher.returncode) == ([], 1)  # torchrun's own code, whatever its ranks' is
    nothing_partial(out)
    fewer = (f"train.steps={steps + 1}", "train.resume_changes=[train.steps]")
    more = (*fewer, f"train.resume={out}", f"hydra.run.dir={tmp_path}/more")
    assert f"resuming after step {steps}" in warm.run([*ENDLESS, *more])


def test_ranks_end_when_torchrun_is_killed_and_say_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with under_torchrun(*ENDLESS, f"hydra.run.dir={out}") as (launcher, ranks):
        launcher.kill()
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive
        _, said = launcher.communicate(timeout=10)
    failed = record_file.read(out)["failure"]
    assert (failed["rank"], failed["error"]) == (None, "the launcher is gone")
    (sentence,) = [line for line in said.splitlines() if line.startswith("harness: ")]
    assert re.fullmatch(r"harness: the run stopped in step \d+, .*: the launcher is gone", sentence)
    assert "Traceback" not in said
    nothing_partial(out)


KILLED = r"rank {}{} failed: its process \d+ ended without an error message; was it killed\?"


@pytest.mark.parametrize(
    ("point", "victim"),
    [("connect", 1), ("directory", 0), ("start", 1)],
)
def test_a_rank_that_is_killed_before_the_first_step_is_the_one_named(
    warm: Warm, tmp_path: Path, point: str, victim: int
) -> None:
    code = tuple(-signal.SIGKILL if rank == victim else 3 for rank in range(2))
    record, sentence = faulty(warm, f"kill {point} - {victim}", tmp_path / "out", code=code)
    assert re.fullmatch(KILLED.format(victim, ""), sentence)
    assert not record or record["failure"]["rank"] == victim
    assert bool(record) == (point == "start")


def test_under_torchrun_a_rank_that_is_killed_before_all_have_met_is_named_by_the_others(
    tmp_path: Path,
) -> None:
    words = ("kill", "connect", "-", "1", *SMALL, f"hydra.run.dir={tmp_path}/out")
    result = subprocess.run(
        [*LAUNCHER, "--nproc-per-node=2", str(FAULTY), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("harness: ")]
    assert re.fullmatch(KILLED.format(1, ""), sentence.removeprefix("harness: "))
    cause = result.stderr.partition("Root Cause")[2]  # as torchrun sees it
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 ", cause)
    assert f"traceback : {sentence}" in result.stderr
    assert result.stderr.count("exitcode  : 3 ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("hang", r"it hangs at .*/faulty\.py line \d+ in act; rank 0 waited 8 s for it \(world\.timeout\)"),
        ("stop", r"its process \d+ is stopped, by a signal or a debugger; rank 0 waited 8 s for it"),
    ],
)
def test_the_rank_that_hangs_is_blamed_and_not_the_one_that_waits(
    warm: Warm, tmp_path: Path, kind: str, said: str
) -> None:
    out, code = tmp_path / "out", (3, -signal.SIGKILL)
    record, sentence = faulty(warm, f"{kind} forward 3 1", out, "world.timeout=8", code=code)
    start = "rank 1 failed in step 3, forward of micro-batch 0: "
    assert re.fullmatch(re.escape(start) + said, sentence)
    assert record["failure"]["rank"] == 1
    assert record["failure"]["where"] == {"step": 3, "phase": "forward", "micro_batch": 0}
    if kind == "hang":
        innermost, *outer = (out / "failure-rank1.txt").read_text().splitlines()
        assert re.search(r"faulty\.py line \d+ in act$", innermost)
        assert any("in train_step" in frame for frame in outer)
