"""A loss that is NaN on one of two ranks: both stop before the update, and the rank and its module are named."""

from pathlib import Path

import pytest

from harness.record import record_file
from tests import poison
from tests.distributed.conftest import NARROW, QUICK, RATED, ROOT, Warm

FAULTY = str(Path(__file__).with_name("faulty.py"))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["pipeline.stages=2", "zero=1", "precision=bf16", "train.accumulation=2"], "rank 1, stage 1,"),
        pytest.param(["zero=3", "precision=fp32"], "rank 0", marks=pytest.mark.exhaustive),
        pytest.param(["zero=2", "precision=bf16"], "rank 1", marks=pytest.mark.exhaustive),
    ],
)
def test_the_rank_and_the_module_of_a_loss_that_is_nan_are_named(
    warm: Warm, tmp_path: Path, words: list[str], name: str
) -> None:
    run = ["mode=train", *QUICK, *NARROW, *RATED, "hardware=cpu", "train.save_every=1", *words]
    layers = ["model.config.num_hidden_layers=3", "pipeline.split=[1,2]"] if "stages" in words[0] else []
    fault = [FAULTY, "nan", "forward", "1", "1"]
    said = warm.run([*fault, *run, *layers, f"hydra.run.dir={tmp_path}/out"], code=3, directory=ROOT)
    (sentence,) = {line for line in said.splitlines() if line.startswith("harness: ")}
    place = f"{poison.PLACE} is the first module whose output is not finite"
    assert sentence.startswith(
        f"harness: {name} failed in step 1, forward of micro-batch 0: FloatingPointError: "
    )
    assert place in sentence
    record = record_file.read(tmp_path / "out")
    assert record["status"] == "failed"
    assert len(record["training"]["losses"]) == 1
    assert [each.name for each in (tmp_path / "out/state").iterdir()] == ["step-00000001"]


def test_weights_that_an_update_made_infinite_are_the_failure_of_the_rank_that_has_them(
    warm: Warm, tmp_path: Path
) -> None:
    run = [
        "mode=train",
        *QUICK,
        *NARROW,
        *RATED,
        "hardware=cpu",
        "zero=3",
        "precision=bf16",
        "train.save_every=1",
    ]
    said = warm.run(
        [FAULTY, "inf", "step", "1", "1", *run, f"hydra.run.dir={tmp_path}/out"], code=3, directory=ROOT
    )
    (sentence,) = [line for line in said.splitlines() if line.startswith("harness: ")]
    start = "harness: rank 1 failed in step 1, checkpoint of micro-batch 0: NotFinite: "
    assert sentence.startswith(start)
    assert sentence.endswith("is not finite after the update; no state of it is saved")
    assert [each.name for each in (tmp_path / "out/state").iterdir()] == ["step-00000001"]
