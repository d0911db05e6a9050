"""What stages keep: the law of 1F1B by rehearsal, and the tools that show it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.config.compose import compose
from harness.config.load import load
from harness.model.plan import Plan
from harness.rehearsal.one_rank import rehearse

NARROW = (
    *("hardware=cpu", "precision=bf16", "model.attention=sdpa"),
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.vocab_size=400",
    "ledger.steps=1",
)
TRAIN = ("mode=train", "train.sequence=16", "train.micro_batch=1", "train.steps=1", "train.validate_every=0")
INFER = (
    "mode=infer",
    "generation.max_new_tokens=4",
    "generation.batch=16",
    "generation.count=16",
    "generation.stop_at_eos=false",
)


OTHER_PIPELINES = [(2, 3), (2, 20), (4, 1), (4, 20), (8, 20), (8, 1), (8, 3), (16, 1), (16, 3), (16, 20)]


@cache
def rank_of(stages: int, stage: int, *words: str) -> dict[str, Any]:
    """The books of a stage of so many, of two layers each."""
    shape = (f"pipeline.stages={stages}", f"model.config.num_hidden_layers={2 * stages}")
    plan = Plan.of(load(compose([*NARROW, *shape, *words, "world=rehearsed", f"world.size={stages}"])))
    return rehearse(plan, stage)[0].tree()


@pytest.mark.parametrize(
    ("stages", "micro_batches"),
    [
        *((2, 1), (4, 3), (2, 5)),
        *(pytest.param(stages, count, marks=pytest.mark.exhaustive) for stages, count in OTHER_PIPELINES),
    ],
)
def test_as_many_forwards_are_alive_as_stages_from_it_on(stages: int, micro_batches: int) -> None:
    kept = []
    for stage in sorted({0, 1, stages // 2, stages - 1}):
        forwards = rank_of(stages, stage, *TRAIN, f"train.accumulation={micro_batches}")["forwards"]
        assert forwards["alive"] == min(stages - stage, micro_batches)
        assert len(forwards["stashes"]) == forwards["alive"]
        kept.append(forwards["bytes"] // forwards["alive"])
    middle = kept[1:-1]
    assert len(set(middle)) <= 1  # each of them has the same layers


@pytest.mark.parametrize(
    "stages", [2, 4, *(pytest.param(more, marks=pytest.mark.exhaustive) for more in (8, 16))]
)
def test_a_stage_that_generates_keeps_nothing_however_many_there_are(stages: int) -> None:
    whole = rank_of(1, 0, *INFER)
    for stage in sorted({0, stages // 2, stages - 1}):
        rank = rank_of(stages, stage, *INFER)
        assert rank["forwards"] == {"alive": 0, "bytes": 0, "stashes": [], "where": None}
        assert all(phase["saved"] == 0 for phase in rank["phases"])
        assert rank["categories"]["activations"]["peak"] <= whole["categories"]["activations"]["peak"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Rehearsed runs by mode and stages."""
    result = {}
    for mode, words in {"train": (*TRAIN, "train.accumulation=6", "zero=1"), "infer": INFER}.items():
        for stages in (1, 3):
            place = tmp_path_factory.mktemp("run") / f"{mode}-{stages}"
            shape = (f"pipeline.stages={stages}", "model.config.num_hidden_layers=3", f"world.size={stages}")
            assert main([*NARROW, *words, *shape, "world=rehearsed", f"hydra.run.dir={place}"]) == 0
            result[mode, stages] = place
    return result


def figures(path: Path) -> tuple[int, int]:
    """The bytes that the worst rank keeps for backward, and its activations at most."""
    ranks = json.loads((path / "record.json").read_text())["ranks"]
    return max(r["forwards"]["bytes"] for r in ranks), max(
        r["categories"]["activations"]["peak"] for r in ranks
    )


def test_contrast_gives_the_records_own_figures(
    runs: dict[tuple[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["contrast", "--json", *map(str, runs.values())]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert [(each["mode"], each["stages"]) for each in actual] == [
        (m, s) for m in ("train", "infer") for s in (1, 3)
    ]
    for each in actual:
        assert (each["kept"], each["activations"]) == figures(runs[each["mode"], each["stages"]])
        assert each["alive"] == (each["stages"] if each["mode"] == "train" else 0)


def test_contrast_draws_every_run_on_one_scale(
    runs: dict[tuple[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["contrast", *map(str, runs.values())]) == 0
    said = capsys.readouterr().out
    bars = [line.count("#") for line in said.splitlines() if "stage" in line and "rehearsed" in line]
    assert len(bars) == 4
    assert max(bars) == 24
    assert "from 1 to 3 stages the worst rank keeps nothing for backward" in said


def test_contrast_wants_two_runs(
    runs: dict[tuple[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["contrast", str(runs["train", 1])]) == 2
    assert "name two runs or more" in capsys.readouterr().err


def test_compare_lines_runs_up_by_stage_and_says_what_they_keep(
    runs: dict[tuple[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(runs["train", 1]), str(runs["train", 3])]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "stage 0" in said
    assert "stage 2" in said
    assert "tiny pipeline.stages=1 world.size=1 keeps 1 forward of" in said
    assert "tiny pipeline.stages=3 world.size=3 keeps 3 forwards of" in said
    assert "on stage 0 of 3: a stage keeps one for each stage from it on" in said


def test_compare_says_that_inference_keeps_none(
    runs: dict[tuple[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(runs["train", 3]), str(runs["infer", 3])]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "infer tiny keeps none on stage" in said
    assert "inference has no backward" in said


def test_explain_says_what_stages_do(
    runs: dict[tuple[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--json", "--no-rehearsal", str(runs["train", 3])]) == 0
    actual = {each["kind"]: each for each in json.loads(capsys.readouterr().out)}
    assert actual["stash"]["bytes"] == figures(runs["train", 3])[0]
    assert "by stage they are 3, 2, 1" in actual["stash"]["sentence"]
    assert "for 25% of a step" in actual["bubble"]["sentence"]  # (3 - 1) / (6 + 3 - 1)
    assert "ranks" not in actual
    main(["explain", "--json", "--no-rehearsal", str(runs["train", 1])])
    assert not {"stash", "bubble", "ends"} & {each["kind"] for each in json.loads(capsys.readouterr().out)}
