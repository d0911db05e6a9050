"""Runs side by side, and a run by itself, from records that anybody may have written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.analysis import compare
from harness.analysis.summary import show
from harness.ledger.categories import CATEGORIES
from harness.record import record_file
from harness.tables import difference, factor, size

KIB = 1024
Compared = Callable[..., str]


def rank_of(
    number: int, kernel: int | None, saved: int | None, measured: dict[str, int | None]
) -> dict[str, Any]:
    """A rank whose activations are `number` bytes more than `held` says."""
    categories: dict[str, int | None] = {**dict.fromkeys(CATEGORIES, 0), **measured, "kernel": kernel}
    if categories["activations"] is not None:
        categories["activations"] += number
    total = sum(filter(None, categories.values()))
    where = {"step": 1, "phase": "backward", "micro_batch": 2, "module": "layers.3", "op": "mm.default"}
    return {
        "rank": number,
        "stage": 0,
        "stands_for": [number],
        "peak": {"bytes": total, "where": where, "categories": categories, "saved": saved},
        "categories": {name: {"peak": categories[name], "end": 0} for name in CATEGORIES},
        "phases": [],
        "allocator": {"source": "cpu-events", "peak": total, "unattributed": 0, "foreign": 0},
    }


def record_of(
    mode: str = "train", ranks: int = 1, kernel: int | None = 0, saved: int | None = 0, **measured: int | None
) -> dict[str, Any]:
    """A record as a run leaves it."""
    return {
        "schema": "harness.record/1",
        "status": "complete",
        "mode": mode,
        "world": {"kind": "torchrun", "size": ranks, "device": "cpu", "device_name": "x86_64"},
        "model": {"name": "tiny", "parameters": 3098880, "dtype": "bfloat16"},
        "config": {},
        "environment": {},
        "ranks": [rank_of(number, kernel, saved, measured) for number in range(ranks)],
    }


def unmeasured(record: dict[str, Any]) -> dict[str, Any]:
    """`record` as ledger=off leaves it."""
    for rank in record["ranks"]:
        none = dict.fromkeys(rank["peak"]["categories"])
        rank["peak"] = {"bytes": None, "where": None, "categories": none, "saved": None}
        rank["categories"] = {name: {"peak": None, "end": None} for name in CATEGORIES}
        rank["allocator"] = {"source": None, "peak": None, "unattributed": None, "foreign": None}
    return record


def put(directory: Path, record: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "record.json").write_text(json.dumps(record))
    return directory


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compared:
    """What is printed for records, each in a directory of its own: a, b, c."""

    def run(*records: dict[str, Any], options: tuple[str, ...] = ()) -> str:
        paths = [put(tmp_path / name, record) for name, record in zip("abcdefgh", records, strict=False)]
        assert compare.main([*map(str, paths), *options]) == 0
        return capsys.readouterr().out

    return run


TRAIN = {"optimizer": 8 * KIB, "activations": 4 * KIB, "parameters": 2 * KIB, "saved": 3 * KIB}
INFER = {"kv_cache": 3 * KIB, "activations": KIB, "parameters": 2 * KIB}


def train() -> dict[str, Any]:
    return record_of("train", **TRAIN)


def infer() -> dict[str, Any]:
    return record_of("infer", **INFER)


def section(text: str, title: str) -> list[list[str]]:
    """The rows under `title`, as words."""
    rows: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if line and not line.startswith((" ", "-")):
            inside = line == title
        elif inside and line.strip("- "):
            rows.append([cell.strip() for cell in line.split("   ") if cell.strip()])
    return rows


def row(text: str, name: str, title: str = "at the peak of the worst rank") -> list[str]:
    (actual,) = [cells for cells in section(text, title) if cells[0] == name]
    return actual[1:]


def notes(text: str) -> str:
    """What stands under the table, unfolded."""
    return " ".join(text.partition("\n\n")[2].split())


# Two runs


def test_each_category_has_its_bytes_the_signed_difference_and_the_factor(compared: Compared) -> None:
    text = compared(train(), infer())
    assert row(text, "parameters") == ["2.0 KiB", "2.0 KiB", "same"]
    assert row(text, "optimizer") == ["8.0 KiB", "0 B", "-8.0 KiB"]
    assert row(text, "activations") == ["4.0 KiB", "1.0 KiB", "-3.0 KiB", "x 0.25"]
    assert row(text, "kv_cache") == ["0 B", "3.0 KiB", "+3.0 KiB"]
    assert row(text, "kernel") == ["0 B", "0 B", "same"]
    assert row(text, "total") == ["14.0 KiB", "6.0 KiB", "-8.0 KiB", "x 0.43"]
    assert row(text, "allocator's own peak") == ["14.0 KiB", "6.0 KiB", "-8.0 KiB", "x 0.43"]
    assert row(text, "unattributed") == ["0 B", "0 B", "same"]


def test_rows_keep_the_order_of_the_categories_whatever_is_largest(compared: Compared) -> None:
    names = [cells[0] for cells in section(compared(train(), infer()), "at the peak of the worst rank")]
    assert names == [
        *("parameters", "optimizer", "activations", "saved for backward", "kv_cache", "kernel"),
        *("total", "allocator's own peak", "unattributed"),
    ]


def test_what_is_recomputed_is_shown_where_any_run_recomputes(compared: Compared) -> None:
    plain, recomputing = (record_of(activations=4 * KIB, saved=3 * KIB) for _ in range(2))
    assert "recomputed" not in compared(plain, plain)
    recomputing["ranks"][0]["peak"]["recomputed"] = 2 * KIB
    assert row(compared(plain, recomputing), "recomputed in backward") == ["-", "2.0 KiB", "-"]
    plain["ranks"][0]["peak"]["recomputed"] = 0
    text = compared(plain, recomputing)
    assert row(text, "recomputed in backward") == ["0 B", "2.0 KiB", "+2.0 KiB"]
    assert "    recomputed in backward" in show(recomputing)
    assert "recomputed" not in show(plain)


def test_what_is_saved_for_backward_is_a_part_of_the_activations_and_nothing_in_inference(
    compared: Compared,
) -> None:
    text = compared(train(), infer())
    assert row(text, "saved for backward") == ["3.0 KiB", "0 B", "-3.0 KiB"]
    assert "\n    saved for backward " in text


def test_the_heading_says_mode_model_and_world_and_fits_a_hundred_columns(compared: Compared) -> None:
    trained, generating = train(), infer()
    trained["model"]["name"] = "meta-llama/Llama-3.1-405B-Instruct"
    generating["model"]["name"] = "/a/very/long/way/to/outputs/train/checkpoint"
    generating["world"] |= {"size": 64, "device": "cuda"}
    text = compared(trained, generating, options=("--bytes",))
    heading = text.partition("---")[0]
    assert heading.split("\n")[0].split() == ["train", "infer"]
    assert heading.split("\n")[1].split() == ["...ama-3.1-405B-Instruct", "train/checkpoint"]
    assert "64 x cuda, bfloat16" in heading
    assert max(map(len, text.splitlines())) <= 100


def test_what_is_zero_everywhere_is_named_and_not_dropped(compared: Compared) -> None:
    text = compared(train(), infer())
    assert "0 B at these peaks: gathered, gradients, communication, inputs, workspace\n" in text


def test_a_category_this_version_does_not_know_is_shown(compared: Compared) -> None:
    text = compared(train(), record_of("infer", **INFER, slack=5 * KIB))
    assert row(text, "slack") == ["-", "5.0 KiB", "-"]


def test_the_last_sentence_says_what_changed_the_most_and_by_how_much(compared: Compared) -> None:
    assert notes(compared(train(), infer())).endswith(
        "At its peak infer tiny holds 8.0 KiB less than train tiny (6.0 KiB, not 14.0 KiB): "
        "optimizer shrank the most, by 8.0 KiB."
    )
    assert notes(compared(infer(), train())).endswith(
        "At its peak train tiny holds 8.0 KiB more than infer tiny (14.0 KiB, not 6.0 KiB): "
        "optimizer grew the most, by 8.0 KiB."
    )


def test_bytes_that_only_moved_between_categories_are_said_to_have_moved(compared: Compared) -> None:
    moved = compared(record_of(gradients=7), record_of("infer", workspace=7))
    assert "At its peak infer tiny holds as much as train tiny; gradients shrank the most, by 7 B." in moved


def test_equal_runs_are_said_to_be_equal_by_their_directories_names(compared: Compared) -> None:
    text = compared(train(), train())
    assert text.split("\n")[2].split() == ["(a)", "(b)"]
    assert text.endswith("At its peak train tiny (b) holds what train tiny (a) does, in every category.\n")


def test_runs_in_directories_of_one_name_are_told_apart_by_their_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(Path("zero2/run"), train())
    put(Path("zero3/run"), train())
    assert compare.main(["zero2/run", "zero3/run/record.json"]) == 0
    assert notes(capsys.readouterr().out).endswith(
        "At its peak train tiny (zero3/run) holds what train tiny (zero2/run) does, in every category."
    )


def test_exact_bytes_on_request(compared: Compared) -> None:
    text = compared(train(), infer(), options=("--bytes",))
    assert row(text, "optimizer") == ["8,192 B", "0 B", "-8,192 B"]
    assert "by 8,192 B." in text


# Ranks, and other moments than the peak


def test_the_worst_rank_is_compared_and_marked_among_all(compared: Compared) -> None:
    text = compared(record_of(ranks=3, inputs=10), record_of("infer", ranks=2, inputs=10))
    assert row(text, "total") == ["12 B", "11 B", "-1 B", "x 0.92"]
    title = "each rank's peak"
    assert row(text, "rank 0", title) == ["10 B", "10 B", "same"]
    assert row(text, "rank 1", title) == ["11 B", "worst 11 B", "same"]
    assert row(text, "rank 2", title) == ["worst 12 B"]


def test_neighbouring_ranks_that_are_alike_share_a_row(compared: Compared) -> None:
    run = record_of(ranks=8, inputs=10)
    for rank in run["ranks"][:3] + run["ranks"][4:]:
        rank["peak"]["bytes"] = 10
    assert section(compared(run, run), "each rank's peak") == [
        ["ranks 0 to 2", "10 B", "10 B", "same"],
        ["rank 3", "worst 13 B", "worst 13 B", "same"],
        ["ranks 4 to 7", "10 B", "10 B", "same"],
    ]


def test_a_rank_stands_for_those_it_names(compared: Compared) -> None:
    rehearsed = record_of(inputs=10)
    rehearsed["world"] = {"kind": "rehearsed", "size": 512, "device": "cpu"}
    rehearsed["ranks"][0]["stands_for"] = list(range(512))
    (only,) = section(compared(rehearsed, rehearsed), "each rank's peak")
    assert only == ["ranks 0 to 511", "10 B", "10 B", "same"]


def test_a_category_that_peaked_at_another_moment_is_shown_with_its_own_peak(compared: Compared) -> None:
    trained = train()
    trained["ranks"][0]["categories"]["gradients"]["peak"] = 5 * KIB
    title = "each category's own peak, whenever that was"
    assert row(compared(trained, infer()), "gradients", title) == ["5.0 KiB", "0 B", "-5.0 KiB"]


def test_where_peaks_were_not_watched_what_a_phase_ended_with_is_a_lower_bound(compared: Compared) -> None:
    watched, loose = train(), unmeasured(record_of("infer"))
    phase = {"step": 0, "phase": "decode", "micro_batch": 0, "peak": None, "end": None, "saved": None}
    loose["ranks"][0]["phases"] = [
        {**phase, "categories": {"parameters": 2 * KIB, "kv_cache": measured, "activations": None}}
        for measured in (KIB, 3 * KIB, 0)
    ]
    text = compared(watched, loose)
    title = "each category's own peak, whenever that was"
    assert row(text, "parameters", title) == ["2.0 KiB", ">= 2.0 KiB", "-"]
    assert row(text, "kv_cache", title) == ["0 B", ">= 3.0 KiB", "-"]
    assert row(text, "activations", title) == ["4.0 KiB", "-", "-"]
    assert ">= the most when a phase ended; in between nothing was watched" in text.splitlines()


def test_what_was_not_measured_is_a_dash_with_a_legend_and_never_a_zero(compared: Compared) -> None:
    text = compared(record_of(inputs=5), record_of("infer", kernel=None, inputs=5))
    assert row(text, "kernel") == ["0 B", "-", "-"]
    assert "- not measured" in text.splitlines()
    assert "- not measured" not in compared(train(), infer())


def test_runs_without_a_ledger_are_compared_without_a_figure(compared: Compared) -> None:
    text = compared(unmeasured(train()), unmeasured(infer()))
    assert row(text, "total") == ["-", "-", "-"]
    assert f"not measured at these peaks: {', '.join(CATEGORIES)}" in notes(text)
    assert notes(text).endswith(
        "The peak of train tiny was not measured, so what changed the most is not known."
    )


def test_what_waits_on_the_host_has_rows_of_its_own(compared: Compared) -> None:
    offloaded = train()
    offloaded["ranks"][0]["on_host"] = {"activations": 2 * KIB, "pinned": 4 * KIB}
    text = compared(train(), offloaded)
    assert row(text, "activations on the host") == ["0 B", "2.0 KiB", "+2.0 KiB"]
    assert row(text, "pinned for them") == ["0 B", "4.0 KiB", "+4.0 KiB"]
    offloaded["ranks"][0]["on_host"]["pinned"] = None  # on a CPU
    text = compared(unmeasured(train()), offloaded)
    assert row(text, "activations on the host") == ["-", "2.0 KiB", "-"]
    assert row(text, "pinned for them") == ["-", "-", "-"]
    assert "on the host" not in compared(train(), infer())


def test_bytes_in_no_figure_have_a_row_of_their_own(compared: Compared) -> None:
    mapped = infer()
    mapped["ranks"][0]["allocator"]["foreign"] = 2 * KIB
    assert row(compared(train(), mapped), "foreign, in no figure") == ["0 B", "2.0 KiB", "+2.0 KiB"]
    assert "foreign" not in compared(train(), infer())


# Other forms


def test_json_is_exact_integers_and_null(compared: Compared) -> None:
    runs = record_of(optimizer=10), record_of("infer", optimizer=7, kernel=None)
    first, second = json.loads(compared(*runs, options=("--json",)))["runs"]
    assert first["peak"]["categories"]["optimizer"] == 10
    assert first["difference"]["bytes"] == 0
    assert (second["mode"], second["status"], second["worst_rank"]) == ("infer", "complete", 0)
    assert second["difference"]["bytes"] == second["difference"]["categories"]["optimizer"] == -3
    assert second["peak"]["categories"]["kernel"] is second["difference"]["categories"]["kernel"] is None
    assert second["highest"] == {**dict.fromkeys(CATEGORIES, 0), "optimizer": 7}
    assert second["ranks"] == [{"rank": 0, "peak": 7}]
    assert second["allocator"]["unattributed"] == 0


def test_markdown_is_one_table_whose_rows_have_the_same_cells(compared: Compared) -> None:
    text = compared(train(), infer(), options=("--markdown",))
    table, *rest = text.split("\n\n")
    assert {line.count("|") for line in table.splitlines()} == {6}
    assert table.splitlines()[0] == (
        "|  | train tiny 1 x cpu, bfloat16 | infer tiny 1 x cpu, bfloat16 | difference | factor |"
    )
    assert "| optimizer | 8.0 KiB | 0 B | -8.0 KiB |  |" in table.splitlines()
    assert "| &emsp;saved for backward | 3.0 KiB | 0 B | -3.0 KiB |  |" in table.splitlines()
    assert rest[-1].startswith("At its peak infer tiny holds 8.0 KiB less")


def test_a_name_cannot_break_the_markdown_table(compared: Compared) -> None:
    odd = infer()
    odd["model"]["name"] = "a|b\n<i>`"
    heading = compared(train(), odd, options=("--markdown",)).splitlines()[0]
    assert r"infer a\|b?\<i>\`" in heading


def test_three_runs_are_each_held_against_the_first(compared: Compared) -> None:
    text = compared(train(), infer(), record_of("infer", ranks=2, kv_cache=6 * KIB, optimizer=16 * KIB))
    assert row(text, "kv_cache") == ["0 B", "3.0 KiB", "6.0 KiB"]
    against = "at the peak of the worst rank, against train tiny"
    assert row(text, "kv_cache", against) == ["+3.0 KiB", "+6.0 KiB"]
    assert row(text, "optimizer", against) == ["-8.0 KiB", "+8.0 KiB  x 2.00"]
    assert notes(text).count("At its peak ") == 2


# Failed runs and what is no record


def test_a_failed_run_is_compared_and_said_to_have_failed_and_where(compared: Compared) -> None:
    where = {"step": 3, "phase": "forward", "micro_batch": 1}
    failure = {"rank": 1, "where": where, "error": "RuntimeError: out of \x1b[31mluck\n"}
    text = compared(train(), {**infer(), "status": "failed", "failure": failure})
    assert row(text, "total")[:2] == ["14.0 KiB", "6.0 KiB"]
    assert "infer tiny failed on rank 1 in step 3, forward: RuntimeError: out of ?[31mluck?" in text


def test_a_failed_run_without_books_shows_dashes(compared: Compared) -> None:
    broken = {**infer(), "status": "failed", "ranks": []}
    text = compared(train(), broken)
    assert row(text, "total") == ["14.0 KiB", "-", "-"]
    assert (
        "infer tiny failed: its record does not say why infer tiny has the accounting of 0 of its 1 ranks"
        in notes(text)
    )
    assert "The peak of infer tiny was not measured" in notes(text)
    reported = json.loads(compared(train(), broken, options=("--json",)))["runs"][1]
    assert (reported["worst_rank"], reported["peak"]["bytes"], reported["ranks"]) == (None, None, [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "contains no record.json"),
        ("", "cannot be read"),
        ('{"schema": "harness.rec', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"schema": ' + "1" * 5000 + "}", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("[]", "has schema None"),
        ('{"schema": "harness.record/9"}', "has schema 'harness.record/9'"),
        ('{"schema": "harness.record/1"}', "is not a complete record: status is missing"),
        ('{"schema": "harness.record/1", "status": "done"}', "is not a complete record: status='done': "),
    ],
)
def test_what_is_no_record_is_one_sentence_and_exit_code_2(
    content: str | bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = put(tmp_path / "good", train()), tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "record.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused([good, bad], capsys, f"harness: {bad}", says)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_record_is_the_same_however_an_editor_saves_it(encoding: str, tmp_path: Path) -> None:
    plain, saved = put(tmp_path / "plain", train()), tmp_path / "saved.json"
    saved.write_bytes((plain / "record.json").read_text().encode(encoding))
    assert record_file.read(saved) == record_file.read(plain)


def refused(paths: list[Path], capsys: pytest.CaptureFixture[str], *says: str) -> None:
    assert compare.main([str(path) for path in paths]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("harness: ")
    assert err.count("\n") == 1
    for words in says:
        assert words in err


@pytest.mark.parametrize("value", ["12", 1.5, True, -1, 2**63, [1], {}])
def test_a_figure_that_is_no_count_of_bytes_is_named(
    value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = infer()
    wrong["ranks"][0]["peak"]["categories"]["optimizer"] = value
    paths = [put(tmp_path / "a", train()), put(tmp_path / "b", wrong)]
    refused(
        paths, capsys, f"b is not a complete record: ranks.0.peak.categories.optimizer={value!r}: should be"
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["world"], 4),
        (["world", "size"], 0),
        (["world", "device"], None),
        (["model", "name"], ["tiny"]),
        (["ranks"], {}),
        (["ranks"], [7]),
        (["ranks", 0, "rank"], "0"),
        (["ranks", 0, "stands_for"], [[]]),
        (["ranks", 0, "peak", "where"], "here"),
        (["ranks", 0, "allocator"], None),
        (["failure"], "no luck"),
        (["performance"], {"tokens_per_second": "fast"}),
        (["mode"], 3),
    ],
)
def test_a_field_of_another_type_is_named(
    path: list[str | int], value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: Any = infer()
    part = wrong
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    paths = [put(tmp_path / "a", wrong), put(tmp_path / "b", train())]
    refused(paths, capsys, f"a is not a complete record: {'.'.join(map(str, path))}")


@pytest.mark.parametrize("field", ["status", "mode", "world", "model", "ranks"])
def test_a_missing_field_is_named(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = infer()
    del wrong[field]
    paths = [put(tmp_path / "a", train()), put(tmp_path / "b", wrong)]
    refused(paths, capsys, f"b is not a complete record: {field} is missing")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused([put(tmp_path / "a", train()), tmp_path / "nowhere"], capsys, "nowhere contains no record.json")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "there is nothing to compare with; name two runs or more"),
        (["a"], "there is nothing to compare with; name two runs or more"),
        (["a", "b", "--jsn"], "unrecognized arguments: --jsn; --help lists what there is"),
        (["a", "b", "--json", "--markdown"], "not allowed with argument"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([Path(word) for word in words], capsys, says)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        compare.main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("RUN", "--json", "--markdown", "--bytes"))


def test_comparing_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    pair = [str(put(tmp_path / "a", train())), str(put(tmp_path / "b", infer()))]
    script = (
        f"import sys; from harness.__main__ import main; assert main({['compare', *pair]!r}) == 0; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=root)


# One run by itself


def test_a_run_is_shown_with_its_largest_category_first_and_its_share() -> None:
    text = show(train())
    assert text.splitlines()[0] == "train tiny: 3,098,880 parameters, bfloat16, 1 x cpu"
    assert section(text, "rank 0") == [
        ["optimizer", "8.0 KiB", "57.1%", "8.0 KiB", "0 B"],
        ["activations", "4.0 KiB", "28.6%", "4.0 KiB", "0 B"],
        ["saved for backward", "3.0 KiB", "21.4%"],
        ["parameters", "2.0 KiB", "14.3%", "2.0 KiB", "0 B"],
        ["kernel", "0 B", "0.0%"],
        ["total", "14.0 KiB", "100.0%"],
        ["allocator's own peak", "14.0 KiB"],
        ["unattributed", "0 B"],
    ]
    assert "0 B throughout: gathered, gradients, kv_cache, communication, inputs, workspace" in text


def test_a_run_says_where_its_peak_was() -> None:
    assert "peak in step 1, backward of micro-batch 2, module layers.3, mm.default" in show(train())


def test_a_category_that_is_gone_by_the_peak_is_still_shown() -> None:
    run = train()
    run["ranks"][0]["categories"]["gradients"] = {"peak": 5 * KIB, "end": 7}
    assert row(show(run), "gradients", "rank 0") == ["0 B", "0.0%", "5.0 KiB", "7 B"]


def test_of_several_ranks_the_worst_is_shown_and_said_to_be() -> None:
    assert section(show(record_of(ranks=2, inputs=5)), "rank 1 of 2, the worst")
    even = record_of(ranks=2, inputs=5)
    even["ranks"][0]["peak"]["bytes"] = even["ranks"][1]["peak"]["bytes"]
    assert section(show(even), "rank 0 of 2, all alike")


def test_training_ends_with_its_losses_and_inference_with_its_speeds() -> None:
    trained = {
        **train(),
        "training": {"losses": [6.1, 4.0, 2.25]},
        "performance": {"tokens_per_second": 11919.55},
    }
    assert show(trained).endswith("\nloss 6.100 to 2.250 in 3 steps, 11,920 tokens/s")
    speed = {"tokens_per_second": 5134.6, "time_to_first_token_seconds": 0.1001}
    generated = {**infer(), "performance": speed, "inference": {"kv_bytes_per_token": 2048}}
    assert show(generated).endswith("\n5,135 tokens/s, first token after 100.1 ms, KV 2.0 KiB a token")


def test_a_run_whose_allocator_was_not_heard_says_so() -> None:
    run = record_of(kernel=None, inputs=5)
    run["ranks"][0]["allocator"] = {"source": None, "peak": None, "unattributed": None}
    assert row(show(run), "unattributed", "rank 0") == ["not measured"]
    assert row(show(run), "kernel", "rank 0") == ["-", "-"]
    assert "- not measured" in show(run).splitlines()


def test_a_run_without_a_ledger_says_what_would_measure_it() -> None:
    assert "no memory was measured; ledger=exact measures it" in show(unmeasured(train()))


def test_a_run_under_a_light_ledger_shows_what_its_phases_ended_with() -> None:
    run = unmeasured(train())
    run["ranks"][0]["phases"] = [{"categories": {"parameters": KIB, "inputs": None}}]
    assert row(show(run), "parameters", "rank 0") == ["-", "-", ">= 1.0 KiB", "-"]
    assert f"not measured: {', '.join(CATEGORIES[1:])}" in show(run)


def test_what_is_no_record_is_not_shown() -> None:
    with pytest.raises(ValueError, match=r"not a complete record: ranks is missing"):
        show({key: value for key, value in train().items() if key != "ranks"})


# What moves

MOVES = "what the rank that moves most moves in a step, or a batch"


def moving(record: dict[str, Any], phase: str, **by_link: int) -> dict[str, Any]:
    """`record`, whose last rank moves so many bytes in a phase, and the others nothing."""
    rows = [
        {
            "step": 0,
            "phase": phase,
            "micro_batch": 0,
            "operation": "all-reduce",
            "link": link,
            "calls": 1,
            "bytes": count,
        }
        for link, count in by_link.items()
    ]
    for rank in record["ranks"]:
        rank["traffic"] = []
    record["ranks"][-1]["traffic"] = rows
    return record


def test_what_moves_is_set_beside_by_link_where_all_runs_have_it(compared: Compared) -> None:
    step = moving(record_of("train", ranks=2, **TRAIN), "backward", network=4 * KIB, nvlink=KIB)
    batch = moving(infer(), "decode", nvlink=3 * KIB)
    assert section(compared(step, batch), MOVES) == [
        ["network", "4.0 KiB", "0 B", "-4.0 KiB"],
        ["nvlink", "1.0 KiB", "3.0 KiB", "+2.0 KiB", "x 3.00"],
        ["all links", "5.0 KiB", "3.0 KiB", "-2.0 KiB", "x 0.60"],
    ]
    assert "| network | 4,096 B | 0 B |" in compared(step, batch, options=("--markdown", "--bytes"))
    runs = json.loads(compared(step, batch, infer(), options=("--json",)))["runs"]
    assert [run["traffic"] for run in runs] == [
        {"network": 4 * KIB, "nvlink": KIB},
        {"nvlink": 3 * KIB},
        None,
    ]
    assert MOVES not in compared(step, infer())


# Byte counts


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (KIB**2 - 1, "1.0 MiB"),
        (5 * KIB**3, "5.0 GiB"),
        (None, "-"),
    ],
)
def test_units_are_powers_of_1024(count: int | None, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("first", "other", "shown"),
    [
        (None, 1, ("-", "")),
        (1, None, ("-", "")),
        (7, 7, ("same", "")),
        (0, 7, ("+7 B", "")),
        (7, 0, ("-7 B", "")),
        (4, 6, ("+2 B", "x 1.50")),
        (10_000, 5, ("-9.8 KiB", "x 0.00")),
    ],
)
def test_a_difference_is_signed_and_a_factor_is_given_where_it_says_something(
    first: int | None, other: int | None, shown: tuple[str, str]
) -> None:
    assert (difference(first, other), factor(first, other)) == shown
