"""Where runs are: one, those of a sweep in the order of its jobs, and paths from the home directory."""

import json
from pathlib import Path

import pytest

from harness.analysis.args import Parser
from harness.record.places import one_run_at, runs_in


def made(directory: Path, number: int | None = None) -> Path:
    """A run in `directory`, the job `number` of a sweep."""
    directory.mkdir(parents=True)
    command = [] if number is None else ["zero=1", f"hydra.job.num={number}"]
    (directory / "record.json").write_text(json.dumps({"environment": {"command": command}}))
    return directory


def test_runs_of_a_sweep_are_in_the_order_of_its_jobs(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").touch()
    runs = [made(tmp_path / str(number), number) for number in (10, 2, 0)]
    assert runs_in(tmp_path) == runs[::-1]


def test_directories_named_by_overrides_have_their_jobs_order_too(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").touch()
    names = {"zero=3,lr=1": 0, "zero=1/lr=2": 2, "a": 1}
    for name, number in names.items():
        made(tmp_path / name, number)
    assert [str(run.relative_to(tmp_path)) for run in runs_in(tmp_path)] == sorted(
        names, key=lambda name: names[name]
    )


def test_a_run_is_itself_whatever_lies_below_it(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    made(run / "inside")
    made(tmp_path / ".hidden")
    assert runs_in(run) == [run] == runs_in(tmp_path)
    assert runs_in(run / "record.json") == [run / "record.json"]


def test_a_directory_without_runs_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no record\.json, and no directory in it does$"):
        runs_in(tmp_path)


def test_a_tool_of_one_run_names_one_of_several(tmp_path: Path) -> None:
    made(tmp_path / "0")
    with pytest.raises(ValueError, match=f"contains a run; name one, as {tmp_path}/0$"):
        one_run_at(tmp_path)
    made(tmp_path / "1")
    with pytest.raises(ValueError, match="contains 2 runs; name one, as "):
        one_run_at(tmp_path)


def test_tools_know_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = made(tmp_path / "run")
    parser = Parser("tool", "", "")
    parser.takes_runs("+")
    parser.takes_place("--out", metavar="DIR", help="")
    options = parser.parse_args(["~/run", "~/run/record.json", "./~", "--out=~/x"])
    assert options.run == [run, run / "record.json", Path("~")]
    assert options.out == tmp_path / "x"
