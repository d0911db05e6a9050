"""Runs are named by what they are, each differently, whatever their records have in them."""

import copy
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.labels import LONGEST, SHOWN, labels
from harness.record.schema import parse
from tests.analysis.test_compare import record_of

CONFIG: dict[str, Any] = {
    "mode": "train",
    "model": {"name": "tiny", "config": {"num_hidden_layers": 2}},
    "zero": {"stage": 2, "offload": "none"},
    "train": {"micro_batch": 4, "batch": None, "sequence": 256},
    "generation": {"batch": 4, "cache": "dynamic"},
    "ledger": {"mode": "exact", "trace": True},
    "world": {"kind": "torchrun", "size": None, "timeout": 600.0},
    "hardware": {"name": "auto", "memory": None, "bandwidth": None},
}


def run(mode: str = "train", ranks: int = 1, **settings: Any) -> dict[str, Any]:
    """A record with these values in its config, each by its path with `__` between names."""
    record = record_of(mode, ranks=ranks)
    record["config"] = copy.deepcopy(CONFIG)
    for path, value in settings.items():
        *groups, last = path.split("__")
        node = record["config"]
        for name in groups:
            node = node[name]
        node[last] = value
    return record


def named(*records: dict[str, Any], paths: list[str] | None = None) -> list[str]:
    places = paths or [f"multirun/{number}" for number in range(len(records))]
    parsed = [parse(record, "it") for record in records]
    return [label.text for label in labels([Path(place) for place in places], parsed)]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([run(), run("infer")], ["train tiny", "infer tiny"]),
        (
            [run(zero__stage=stage, train__micro_batch=size) for stage, size in ((0, 1), (3, 2))],
            ["train tiny zero=0 micro_batch=1", "train tiny zero=3 micro_batch=2"],
        ),
        (
            [run("infer", generation__cache="static"), run("infer")],
            ["infer tiny cache=static", "infer tiny cache=dynamic"],
        ),
        ([run(), run(ranks=2)], ["train tiny world.size=1", "train tiny world.size=2"]),
        (
            [run(hardware__name="t4", hardware__memory=7), run(hardware__name="l4", hardware__memory=9)],
            ["train tiny hardware=t4", "train tiny hardware=l4"],
        ),
        ([run(train__batch=8), run()], ["train tiny batch=8", "train tiny batch=null"]),
        ([run(), run("infer"), run("infer")], ["train tiny", "infer tiny (1)", "infer tiny (2)"]),
    ],
)
def test_a_name_says_the_mode_the_model_and_what_differs(
    runs: list[dict[str, Any]], expected: list[str]
) -> None:
    assert named(*runs) == expected


@pytest.mark.parametrize(
    "settings",
    [{"ledger__trace": False}, {"world__timeout": 9.0}, {"generation__cache": "static"}],
)
def test_what_changes_nothing_in_a_run_is_no_part_of_its_name(settings: dict[str, Any]) -> None:
    assert named(run(), run(**settings)) == ["train tiny (0)", "train tiny (1)"]


def test_runs_that_nothing_tells_apart_have_a_number() -> None:
    assert named(run(), run(), paths=["a/b", "a/b"]) == ["train tiny (#1)", "train tiny (#2)"]
    assert named(run(), run(), paths=["a/x", "b/x"]) == ["train tiny (a/x)", "train tiny (b/x)"]


def test_many_differences_make_no_long_name_and_still_a_name_of_its_own() -> None:
    keys = [f"key{number}" for number in range(12)]
    records = [run() for _ in keys]
    for key, record in zip(keys, records, strict=True):
        record["config"]["train"].update({other: int(other == key) for other in keys})
    names = named(*records)
    assert len(set(names)) == len(keys)
    assert all(name.count("=") == SHOWN for name in names)


def test_a_hostile_name_is_printable_and_short() -> None:
    odd = run(train__sequence="\u202e</script>\n" + "x" * 500)
    odd["model"]["name"] = name = "\x1b[31m" + "y" * 500
    other = run()
    other["model"]["name"] = name
    for text in named(odd, other):
        assert text.isprintable()
        assert len(text) < 3 * LONGEST
