"""Training beside generation: what only one has is set apart, bars have one scale, and nothing unmeasured is none."""

from pathlib import Path
from typing import Any

import pytest

from harness.analysis.compare import Run
from harness.analysis.labels import Label
from harness.record.schema import parse
from harness.report.content import ReportedRun
from harness.report.contrast import SAVED, contrast
from tests.analysis.test_compare import KIB, record_of, train, unmeasured

TRAINED = {"parameters": 4 * KIB, "optimizer": 8 * KIB, "gathered": 0}
GENERATED = {"parameters": 4 * KIB, "kv_cache": KIB, "gathered": 0}


def training() -> dict[str, Any]:
    record = record_of("train", **TRAINED, activations=6 * KIB, saved=5 * KIB)
    record["ranks"][0]["categories"]["gradients"]["peak"] = 2 * KIB
    return record


def generating() -> dict[str, Any]:
    return record_of("infer", **GENERATED, activations=2 * KIB)


def shown(*records: dict[str, Any]) -> dict[str, Any]:
    """The contrast of these runs, which must have one."""
    drawn = contrast([reported(record) for record in records])
    assert drawn is not None
    return drawn


def reported(record: dict[str, Any]) -> ReportedRun:
    parsed = parse(record, "it")
    return ReportedRun(Run(Path("run"), parsed), record, Label(parsed.title))


def names(drawn: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the rows, by their group's mode."""
    return {group["only"]: [row["name"] for row in group["rows"]] for group in drawn["groups"]}


def told(drawn: dict[str, Any], name: str) -> list[str]:
    (row,) = [row for group in drawn["groups"] for row in group["rows"] if row["name"] == name]
    return [bar.told for bar in row["bars"]]


def test_what_only_one_mode_has_is_set_apart_the_largest_first() -> None:
    drawn = shown(generating(), training())
    assert names(drawn) == {
        "train": ["optimizer", SAVED, "gradients"],
        "infer": ["kv_cache"],
        "both": ["activations", "parameters"],
    }
    assert told(drawn, "optimizer") == ["8.0 KiB", "none"]
    assert told(drawn, "gradients") == ["0 B, at most 2.0 KiB", "none"]
    assert told(drawn, "kv_cache") == ["none", "1.0 KiB"]
    assert [side["mode"] for side in drawn["sides"]] == ["training", "generation"]
    assert "Only generation has kv_cache (1.0 KiB)." in drawn["sentences"]
    (absent,) = [text for text in drawn["absent"] if text.startswith("0 B in both")]
    assert "gathered" in absent


def test_every_bar_has_the_scale_of_the_largest() -> None:
    drawn = shown(training(), generating())
    largest = 18 * KIB
    (optimizer, _), (_, kv_cache) = (
        row["bars"]
        for group in drawn["groups"]
        for row in group["rows"]
        if row["name"] in ("optimizer", "kv_cache")
    )
    assert optimizer.parts[0].width == pytest.approx(100 * 8 * KIB / largest, abs=0.01)
    assert kv_cache.parts[0].width == pytest.approx(100 * KIB / largest, abs=0.01)
    whole = [sum(part.width for part in side["bar"].parts) for side in drawn["sides"]]
    assert whole == pytest.approx([100, 100 * 7 / 18], abs=0.01)


def test_what_was_not_measured_is_never_called_none() -> None:
    drawn = shown(training(), unmeasured(generating()))
    assert {"train", "infer", "both"}.isdisjoint(names(drawn))
    assert told(drawn, "optimizer") == ["8.0 KiB", "not measured"]
    assert drawn["sides"][1]["bar"].told == "not measured"
    assert not drawn["sentences"]


def test_where_only_phases_were_watched_a_figure_is_a_lower_bound() -> None:
    loose = unmeasured(generating())
    phase = {"step": 0, "phase": "decode", "micro_batch": 0, "peak": None, "end": None, "saved": None}
    loose["ranks"][0]["phases"] = [{**phase, "categories": {"kv_cache": 3 * KIB}}]
    assert told(shown(training(), loose), "kv_cache") == ["none", ">= 3.0 KiB"]


def staged(mode: str, alive: list[int]) -> dict[str, Any]:
    """A run of one rank for each stage, with so many forwards that wait on each."""
    record = record_of(mode, ranks=len(alive), parameters=4 * KIB, activations=8 * KIB * (mode == "train"))
    record["pipeline"] = {"stages": len(alive), "split": [1] * len(alive)}
    for stage, (rank, count) in enumerate(zip(record["ranks"], alive, strict=True)):
        rank |= {"stage": stage, "forwards": {"alive": count, "bytes": count * KIB, "stashes": [KIB] * count}}
    return record


def test_each_stage_shows_every_forward_that_waits_and_none_in_generation() -> None:
    places = shown(staged("train", [3, 2, 1]), staged("infer", [0, 0, 0]))["places"]
    waiting = [[cell["waiting"] for cell in row["cells"]] for row in places["rows"]]
    assert [[len(bar.parts) for bar in bars] for bars in waiting] == [[3, 0], [2, 0], [1, 0]]
    assert [bar.told for bar in waiting[0]] == ["3 forwards wait, 3.0 KiB", "no forward waits"]
    assert waiting[2][0].told == "1 forward waits, 1.0 KiB"
    assert places["sentence"].endswith("by stage: in training 3, 2 and 1; in generation none.")


def test_a_stage_that_only_one_run_has_is_no_figure_of_the_other() -> None:
    places = shown(staged("train", [2, 1]), generating())["places"]
    assert [cell is None for cell in (places["rows"][1]["cells"])] == [False, True]


def test_ranks_have_rows_only_where_their_peaks_differ() -> None:
    assert shown(training(), generating())["places"] is None
    uneven = record_of(ranks=2, parameters=4 * KIB)
    uneven["ranks"][1]["peak"]["bytes"] = KIB
    places = shown(uneven, generating())["places"]
    assert (places["kind"], [row["number"] for row in places["rows"]]) == ("rank", [0, 1])


def test_the_most_alike_runs_are_shown_and_it_is_said_that_there_are_others() -> None:
    other = training()
    other["model"]["parameters"] = 7
    failed = {**training(), "status": "failed"}
    drawn = shown(other, failed, training(), generating())
    assert not drawn["sides"][0]["failed"]
    assert "Of 3 of training and 1 of generation" in drawn["others"]


def test_runs_of_one_mode_have_no_contrast() -> None:
    assert contrast([reported(train()), reported(training())]) is None
