"""Whole runs on two ranks: what they leave, how they go on, and how they fail."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.record import record_file
from tests.distributed.conftest import (
    LAUNCHER,
    NARROW,
    PRECISION,
    QUICK,
    RATED,
    ROOT,
    Launch,
    Warm,
    under_torchrun,
)
from tests.tracked import READERS

SAVED = (
    "mode=train",
    *QUICK,
    *NARROW,
    "train.steps=4",
    "train.save_every=1",
    "train.keep=4",
    "train.export=true",
)


@pytest.fixture(
    scope="session", params=[("zero=2", "precision=bf16"), ("zero=3", "precision=fp32")], ids="-".join
)
def saved(request: pytest.FixtureRequest, launch: Launch) -> tuple[tuple[str, ...], Path]:
    """The words of a run that saved after each of its four steps, and its directory."""
    return request.param, launch(*SAVED, *request.param)


def test_a_resumed_run_goes_on_bitwise_from_the_newest_whole_checkpoint(
    warm: Warm, saved: tuple[tuple[str, ...], Path], tmp_path: Path
) -> None:
    words, whole = saved
    broken = shutil.copytree(whole, tmp_path / "broken")
    with (broken / "state/step-00000004/rank-00001.safetensors").open("r+b") as file:
        file.truncate(1000)
    (broken / "state/step-00000003/manifest.json").unlink()
    around = ("hardware=cpu", PRECISION, *RATED)
    said = warm.run([*around, *SAVED, *words, f"train.resume={broken}", f"hydra.run.dir={tmp_path}/resumed"])
    assert "step-00000004 is corrupt" in said
    assert "step-00000003 is corrupt" in said
    assert "resuming after step 2" in said
    first, second = record_file.read(whole), record_file.read(tmp_path / "resumed")
    assert second["training"]["losses"] == first["training"]["losses"][2:]
    weights = "checkpoint/model.safetensors"
    assert (tmp_path / "resumed" / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_checkpoint_of_another_run_is_refused(
    warm: Warm, saved: tuple[tuple[str, ...], Path], tmp_path: Path
) -> None:
    _, whole = saved
    sentence = warm.refused([*SAVED, "zero=1", f"train.resume={whole}", f"hydra.run.dir={tmp_path}/out"])
    assert sentence.startswith(f"harness: zero.stage=1: {whole}/state/step-00000004 was saved with ")
    assert sentence.endswith("begin a new run from its weights instead, with model.path=")
    assert not (tmp_path / "out/record.json").exists()


def test_the_export_opens_in_transformers_with_its_tokenizer(saved: tuple[tuple[str, ...], Path]) -> None:
    _, whole = saved
    model = AutoModelForCausalLM.from_pretrained(whole / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(whole / "checkpoint")
    loss = model(**_batch(tokenizer, ["import os\nimport sys\n" * 4])).loss
    assert loss < 6.0  # below the loss of a model that knows nothing: ln 384 is 5.95


def test_a_run_directory_is_never_overwritten(warm: Warm, saved: tuple[tuple[str, ...], Path]) -> None:
    words, whole = saved
    before = (whole / record_file.FILE).read_bytes()
    assert warm.refused([*SAVED, *words, f"hydra.run.dir={whole}"]).startswith("harness: hydra.run.dir=")
    assert (whole / record_file.FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        pytest.param([], "rank 1", marks=pytest.mark.exhaustive),
        pytest.param(["pipeline.stages=2", "zero=1"], "rank 1, stage 1,", marks=pytest.mark.exhaustive),
        (["mode=infer", "pipeline.stages=2", "generation.max_new_tokens=900"], "rank 1, stage 1,"),
    ],
)
def test_a_killed_rank_takes_the_run_down_and_is_the_one_named(
    tmp_path: Path, more: list[str], named: str
) -> None:
    words = [
        "mode=train",
        *QUICK,
        "train.steps=100000",
        f"hydra.run.dir={tmp_path}/out",
        "ledger.steps=1",
        *more,
    ]
    with under_torchrun(*words, "train.sequence=16") as (launcher, ranks):
        victim = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
        victim.kill()
        _, said = launcher.communicate(timeout=30)
        assert launcher.returncode != 0, said
        assert not any(rank.is_running() for rank in ranks)
    failed = record_file.read(tmp_path / "out")
    assert (failed["status"], failed["failure"]["rank"]) == ("failed", 1), said
    assert failed["model"]["parameters"] == 3_098_880
    assert f"{named} failed" in said
    assert "rank 0" not in said.partition("harness: ")[2].partition("failed")[0]


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a run whose rank 1 fails in its second step, and what is on stderr."""
    run, trackers = tmp_path_factory.mktemp("failing") / "out", f"tracker=[{','.join(READERS)}]"
    return run, script("fail_on_rank_1.py", ["mode=train", *QUICK, trackers, f"hydra.run.dir={run}"])


@pytest.mark.parametrize("tracker", READERS)
def test_trackers_have_a_failed_run_as_failed(failing: tuple[Path, str], tracker: str) -> None:
    figures, _, state, failure = READERS[tracker](failing[0])
    assert [*figures["train/loss"]] == [1]
    assert state in ("", "failed", "FAILED")
    assert failure == "rank 1 failed in step 1, backward of micro-batch 0: ValueError: out of luck"


def test_a_failing_rank_is_named_with_its_own_error(failing: tuple[Path, str]) -> None:
    run, stderr = failing
    failed = record_file.read(run)
    assert failed["status"] == "failed"
    assert failed["failure"]["rank"] == 1
    assert failed["failure"]["where"] == {"step": 1, "phase": "backward", "micro_batch": 0}
    assert "out of luck" in failed["failure"]["error"]
    sentence = "harness: rank 1 failed in step 1, backward of micro-batch 0: ValueError: out of luck"
    assert [line for line in stderr.splitlines() if line.startswith("harness: ")] == [sentence]
    assert torchrun_report(stderr) == [(3, sentence)] * 2
    (books,) = failed["ranks"]
    assert books["rank"] == 1
    assert books["peak"]["bytes"] > 0


def test_a_refusal_that_needs_the_ranks_is_one_sentence(warm: Warm, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short to train on")
    words = ["data=text", f"data.path={tmp_path}/short.txt", f"hydra.run.dir={tmp_path}/out"]
    sentence = warm.refused(["mode=train", *QUICK, *words])
    assert sentence.startswith(f"harness: data.path={tmp_path}/short.txt: it has 22 tokens")
    assert not (tmp_path / "out").exists()


def test_what_one_rank_refuses_is_what_every_rank_ends_with(tmp_path: Path) -> None:
    words = ["mode=infer", "generation.tensor_parallel=2", f"hydra.run.dir={tmp_path}/out"]
    stderr = script("refuse_on_rank_1.py", words)
    (sentence,) = [line for line in stderr.splitlines() if line.startswith("harness: ")]
    assert sentence == "harness: rank 1: model.path=mine: it is corrupt here; give a complete one"
    assert torchrun_report(stderr) == [(2, sentence)] * 2
    assert not (tmp_path / "out").exists()


def script(name: str, words: list[str]) -> str:
    """What is on stderr where two ranks run a script beside this file and fail."""
    result = subprocess.run(
        [*LAUNCHER, "--nproc-per-node=2", str(Path(__file__).with_name(name)), "hardware=cpu", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    return result.stderr


def torchrun_report(stderr: str) -> list[tuple[int, str]]:
    """Each rank's exit code and last words in torchrun's report, which is the end of `stderr`; the cause is last."""
    report = stderr.rpartition("ChildFailedError")[2]
    actual = re.findall(r"exitcode  : (\d+) .*\n.*\n  traceback : (.*)\n", report)
    assert report.rstrip().splitlines()[-2] == f"  traceback : {actual[-1][1]}"
    return [(int(code), sentence) for code, sentence in actual]


def _batch(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    ids = tokenizer(texts, return_tensors="pt").input_ids
    return {"input_ids": ids, "labels": ids}


def test_all_ranks_run_in_the_precision_and_the_attention_that_rank_0_decides(launch: Launch) -> None:
    words = (
        "mode=infer",
        "model.config.model_type=bloom",
        "model.config.num_hidden_layers=1",
        "precision=auto",
    )
    actual = record_file.read(launch(*words, "generation.count=2", "generation.max_new_tokens=2"))
    precision, dtype = actual["config"]["precision"], getattr(torch, actual["model"]["dtype"])
    assert {"bf16": torch.bfloat16, "fp32": torch.float32}[precision] == dtype
    assert actual["resolved"]["precision"].startswith(f"{precision}: ")
    assert actual["resolved"]["model.attention"] == "eager: transformers has no sdpa for bloom"
    measured = {rank["categories"]["parameters"]["end"] for rank in actual["ranks"]}
    assert measured == {actual["model"]["parameters"] * dtype.itemsize}
