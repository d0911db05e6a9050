"""Runs side by side, from records that anybody may have written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import compare
from harness.ledger.categories import CATEGORIES
from harness.tables import size

KIB = 1024


def write(
    directory: Path, mode: str = "train", ranks: int = 1, kernel: int | None = 0, **held: int | None
) -> Path:
    """A record in `directory` whose rank r holds `held` bytes by category, and r more of activations."""

    def rank(number: int) -> dict[str, Any]:
        categories: dict[str, int | None] = {**dict.fromkeys(CATEGORIES, 0), **held, "kernel": kernel}
        categories["activations"] = (categories["activations"] or 0) + number
        total = sum(filter(None, categories.values()))
        return {
            "rank": number,
            "peak": {
                "bytes": total,
                "where": {"step": 1, "phase": "backward", "micro_batch": 0, "module": "model", "op": "mm"},
                "categories": categories,
                "saved": held.get("activations", 0) if mode == "train" else 0,
            },
            "categories": {name: {"peak": categories[name], "end": 0} for name in CATEGORIES},
            "phases": [],
            "allocator": {"source": "cpu-events", "peak": total, "unattributed": 0},
        }

    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": "harness.record/1",
        "status": "complete",
        "mode": mode,
        "world": {"kind": "torchrun", "size": ranks, "device": "cpu", "device_name": "x86_64"},
        "model": {"name": "tiny", "parameters": 10, "dtype": "bfloat16"},
        "ranks": [rank(number) for number in range(ranks)],
    }
    (directory / "record.json").write_text(json.dumps(record))
    return directory


def change(directory: Path, **fields: Any) -> Path:
    file = directory / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return directory


def table(runs: list[Path], capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert compare.main([*map(str, runs), *options]) == 0
    return capsys.readouterr().out


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    train = write(tmp_path / "a", optimizer=8 * KIB, activations=4 * KIB, parameters=2 * KIB)
    return [train, write(tmp_path / "b", "infer", kv_cache=3 * KIB, parameters=2 * KIB)]


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in line.split("   ") if cell.strip()]


def test_each_category_has_a_row_with_its_difference(
    pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = table(pair, capsys)
    assert row(text, "parameters") == ["parameters", "2.0 KiB", "2.0 KiB", "same"]
    assert row(text, "optimizer") == ["optimizer", "8.0 KiB", "0 B", "-8.0 KiB"]
    assert row(text, "kv_cache") == ["kv_cache", "0 B", "3.0 KiB", "+3.0 KiB"]
    assert row(text, "saved for backward") == ["saved for backward", "4.0 KiB", "0 B", "-4.0 KiB"]
    assert row(text, "total") == ["total", "14.0 KiB", "5.0 KiB", "-9.0 KiB  x0.36"]


def test_what_is_zero_everywhere_is_named_and_not_dropped(
    pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    zero = next(line for line in table(pair, capsys).splitlines() if line.startswith("zero at these peaks"))
    assert zero.partition(": ")[2].split(", ") == [
        "gathered",
        "gradients",
        "communication",
        "inputs",
        "workspace",
        "kernel",
    ]


def test_the_last_sentence_says_what_changed_the_most(
    pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    last = table(pair, capsys).splitlines()[-1]
    assert last == (
        "From train tiny to infer tiny optimizer shrank the most, 8.0 KiB to 0 B; "
        "the peak went from 14.0 KiB to 5.0 KiB."
    )


def test_the_worst_rank_is_compared_and_every_rank_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table([write(tmp_path / "a", ranks=3), write(tmp_path / "b", ranks=2)], capsys)
    assert row(text, "total")[1:3] == ["2 B", "1 B"]
    assert row(text, "rank 1") == ["rank 1", "1 B", "1 B worst"]
    assert row(text, "rank 2") == ["rank 2", "2 B worst"]


def test_exact_bytes_on_request(pair: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert row(table(pair, capsys, "--bytes"), "optimizer") == ["optimizer", "8,192 B", "0 B", "-8,192 B"]


def test_json_is_integers_and_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / "a", optimizer=10), write(tmp_path / "b", optimizer=7, kernel=None)]
    first, second = json.loads(table(runs, capsys, "--json"))["runs"]
    assert first["peak"]["optimizer"] == 10
    assert second["difference"]["optimizer"] == -3
    assert second["peak"]["kernel"] is second["difference"]["kernel"] is None
    assert second["allocator"] == {"peak": 7, "unattributed": 0}


def test_what_was_not_measured_is_a_dash_with_a_legend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table([write(tmp_path / "a"), write(tmp_path / "b", kernel=None)], capsys)
    assert row(text, "kernel") == ["kernel", "0 B", "-", "-"]
    assert "- not measured" in text.splitlines()


def test_markdown_is_one_table(pair: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in table(pair, capsys, "--markdown").splitlines() if line.startswith("|")]
    assert len({line.count(" | ") for line in lines}) == 1
    assert "| optimizer | 8.0 KiB | 0 B | -8.0 KiB |" in lines


def test_three_runs_are_each_held_against_the_first(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table([*pair, write(tmp_path / "c", "infer", kv_cache=6 * KIB)], capsys)
    assert row(text, "kv_cache") == ["kv_cache", "0 B", "3.0 KiB", "6.0 KiB", "+3.0 KiB", "+6.0 KiB"]
    assert text.count("\nFrom train tiny to ") == 2


def test_a_failed_run_is_compared_and_said_to_have_failed(
    pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change(pair[1], status="failed", failure={"rank": 1, "error": "out of \x1b[31mluck", "where": None})
    assert "infer tiny failed: out of ?[31mluck" in table(pair, capsys).splitlines()


def test_a_failed_run_without_ranks_shows_dashes(
    pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change(pair[1], status="failed", failure=None, ranks=[])
    text = table(pair, capsys)
    assert row(text, "total") == ["total", "14.0 KiB", "-", "-"]
    assert "not measured, so not compared" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds no record.json"),
        ("", "cannot be read"),
        ('{"schema": "harness.rec', "cannot be read"),
        ("[]", "has schema None"),
        ('{"schema": "harness.record/9"}', "has schema 'harness.record/9'"),
        ('{"schema": "harness.record/1"}', "is no whole record: KeyError"),
        (
            '{"schema": "harness.record/1", "model": 3, "world": 4, "mode": "train", "ranks": 5}',
            "no whole record",
        ),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_record_is_one_sentence(
    content: str | bytes | None,
    says: str,
    pair: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "record.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert compare.main([str(pair[0]), str(bad)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"harness: {bad}")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("value", ["12", 1.5, True, [1], {}])
def test_a_figure_that_is_no_count_is_refused(
    value: object, pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((pair[1] / "record.json").read_text())
    record["ranks"][0]["peak"]["categories"]["optimizer"] = value
    change(pair[1], ranks=record["ranks"])
    assert compare.main([str(path) for path in pair]) == 2
    assert "is no count of bytes" in capsys.readouterr().err


def test_one_run_has_nothing_to_be_compared_with(
    pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([str(pair[0])]) == 2
    assert "give two runs or more" in capsys.readouterr().err


def test_comparing_needs_no_torch(pair: list[Path]) -> None:
    words = [*map(str, pair)]
    script = (
        f"import sys; from harness import compare; compare.main({words!r}); print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, cwd=root, text=True
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * KIB**3, "5.0 GiB"),
        (None, "-"),
    ],
)
def test_units_are_powers_of_1024(count: int | None, shown: str) -> None:
    assert size(count) == shown
