"""Runs in which one or two settings differ are a series; their table says all that was measured, and null apart."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.compare import Run
from harness.analysis.labels import labels
from harness.record.schema import parse
from harness.report.content import ReportedRun
from harness.report.series import series, table
from tests.analysis.test_compare import unmeasured
from tests.analysis.test_labels import run


def reported(*records: dict[str, Any]) -> list[ReportedRun]:
    parsed = [parse(record, "it") for record in records]
    paths = [Path(f"sweep/{number}") for number in range(len(records))]
    named = labels(paths, parsed)
    return [
        ReportedRun(Run(path, record), raw, label)
        for path, record, raw, label in zip(paths, parsed, records, named, strict=True)
    ]


def panels(*records: dict[str, Any]) -> dict[str, list[str]]:
    """The values of the rows by the title of their panel, of the one series there is."""
    (found,) = series(reported(*records))
    return {panel["title"]: [row["value"] for row in panel["rows"]] for panel in found["panels"]}


def test_one_setting_has_a_row_for_each_value_numbers_by_size() -> None:
    records = [run(train__micro_batch=size) for size in (16, 2, 4)]
    assert panels(*records) == {"": ["micro_batch=2", "micro_batch=4", "micro_batch=16"]}


def test_two_settings_have_a_panel_for_each_value_of_the_one_with_fewer() -> None:
    records = [run(zero__stage=stage, train__micro_batch=size) for stage in (0, 1, 2) for size in (1, 2)]
    rows = ["zero=0", "zero=1", "zero=2"]
    assert panels(*records) == {"micro_batch=1": rows, "micro_batch=2": rows}


def test_three_settings_have_a_panel_for_each_pair_of_values() -> None:
    records = [
        run(zero__stage=stage, train__micro_batch=size, train__sequence=sequence)
        for stage in (0, 1, 2)
        for size in (1, 2)
        for sequence in (8, 16)
    ]
    found = panels(*records)
    assert next(iter(found)) == "micro_batch=1 sequence=8"
    assert [*found.values()] == [["zero=0", "zero=1", "zero=2"]] * 4


def test_settings_that_change_together_are_one() -> None:
    records = [run(zero__stage=stage, train__micro_batch=2**stage) for stage in (1, 2, 3)]
    assert panels(*records)[""][0] == "zero=1 micro_batch=2"


@pytest.mark.parametrize(
    "records",
    [
        [run(), run(zero__stage=1)],
        [run(), run(), run(zero__stage=1)],
        [
            run(zero__stage=a, train__micro_batch=b, train__sequence=c, train__batch=d)
            for a, b, c, d in product((1, 2), repeat=4)
        ],
        [
            run(),
            run(zero__stage=0, train__micro_batch=2),
            run(zero__stage=1, train__micro_batch=1),
            run(zero__stage=3),
        ],
    ],
    ids=["two runs", "a repeated one", "four settings", "few of the combinations"],
)
def test_other_runs_are_no_series(records: list[dict[str, Any]]) -> None:
    assert series(reported(*records)) == []


def test_each_mode_and_model_has_a_series_of_its_own() -> None:
    training = [run(zero__stage=stage) for stage in range(3)]
    generating = [run("infer", generation__batch=size) for size in range(1, 4)]
    assert [each["against"] for each in series(reported(*training, *generating))] == ["zero", "batch"]


def test_the_table_says_which_setting_of_which_run_and_leaves_out_what_was_not_measured() -> None:
    records = [run(zero__stage=1), unmeasured(run(zero__stage=2)), run("infer")]
    drawn = table(reported(*records))
    assert drawn["settings"] == ["zero"]
    assert [row["settings"] for row in drawn["rows"]] == [["1"], ["2"], [""]]
    assert [row["peak"] for row in drawn["rows"]] == [0, None, 0]
    assert drawn["rows"][1]["bar"].told == "not measured"
    assert [row["path"] for row in drawn["rows"]] == ["sweep/0", "sweep/1", "sweep/2"]
