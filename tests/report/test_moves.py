"""What moves: the figures are the record's, to one scale; what was not counted is a sentence and never nothing."""

import html
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest

from harness.analysis import bars, palette
from harness.record.record_file import read
from harness.report import PAGE
from harness.report.moves import moves
from tests.analysis.test_compare import record_of
from tests.report.test_contrast import reported
from tests.report.test_report import HOSTILE, changed, report

KIB = 1024


def transfer(phase: str, operation: str, nbytes: int, link: str | None, **others: Any) -> dict[str, Any]:
    row = {"step": 0, "phase": phase, "micro_batch": 0, "operation": operation, "link": link, "calls": 1}
    return {**row, "bytes": nbytes, "group": "", "ranks": 0, **others}


def moving(mode: str, *rows: dict[str, Any], passes: int | None = None) -> dict[str, Any]:
    """A record in whose only step these move; a decode has so many passes."""
    record = record_of(mode, parameters=4 * KIB)
    names = {"train": ("data", "forward", "backward", "step"), "infer": ("prefill", "decode")}[mode]
    phase = {"step": 0, "micro_batch": 0, "peak": KIB, "end": KIB, "categories": {}, "passes": passes}
    record["ranks"][0] |= {"phases": [{**phase, "phase": name} for name in names], "traffic": [*rows]}
    return record


PAIR = {"group": "0,1", "ranks": 2}

TRAIN = moving(
    "train",
    transfer("forward", "all-gather", 6 * KIB, "nvlink", by_ring=3 * KIB, **PAIR),
    transfer("forward", "all-gather", 6 * KIB, "nvlink", micro_batch=1, by_ring=3 * KIB, **PAIR),
    transfer("step", "all-reduce", 4 * KIB, "network", by_ring=4 * KIB, by_tree=8 * KIB, **PAIR)
    | {"causes": [{"name": "lm_head", "bytes": 4 * KIB}]},
    transfer("setup", "broadcast", 99 * KIB, "network", by_ring=99 * KIB, **PAIR),
)
INFER = moving(
    "infer",
    transfer("prefill", "send", KIB, None, **PAIR),
    transfer("decode", "all-reduce", 8 * KIB, "nvlink", **PAIR),
    passes=4,
)


def of(*records: dict[str, Any]) -> dict[str, Any]:
    return moves([reported(record) for record in records])


def test_a_step_stands_beside_a_batch_and_a_token_to_one_scale() -> None:
    lines = of(TRAIN, INFER)["bars"]
    assert [(line["of"], line["bar"].told) for line in lines] == [
        ("a step", "16.0 KiB"),
        ("a batch", "9.0 KiB"),
        ("a token", "2.0 KiB"),
    ]
    widths = [sum(part.width for part in line["bar"].parts) for line in lines]
    assert widths == pytest.approx([100, 100 * 9 / 16, 100 * 2 / 16], abs=0.01)
    assert lines[0]["bar"].label == "nvlink 12.0 KiB, network 4.0 KiB"


def test_a_link_that_is_not_known_is_called_so() -> None:
    drawn = of(INFER)
    assert drawn["links"] == ["nvlink", "unknown"]
    assert ["prefill", "send", "0,1 (2 ranks)", "unknown", "1", "1.0 KiB", "-", "-"] in drawn["runs"][0][
        "rows"
    ]


def test_operations_are_summed_by_phase_and_group_without_what_a_step_does_not_move() -> None:
    (run,) = of(TRAIN)["runs"]
    assert run["rows"] == [
        ["forward", "all-gather", "0,1 (2 ranks)", "nvlink", "2", "12.0 KiB", "6.0 KiB", "-"],
        ["step", "all-reduce", "0,1 (2 ranks)", "network", "1", "4.0 KiB", "4.0 KiB", "8.0 KiB"],
    ]
    assert run["largest"] == ["lm_head: 4.0 KiB, 25%"]


def test_where_nothing_moves_it_is_said_and_where_nothing_was_counted_nothing_is_drawn() -> None:
    nothing, uncounted = moving("train"), record_of("train", parameters=KIB)
    drawn = of(nothing, uncounted)
    assert [line["bar"].told for line in drawn["bars"]] == ["nothing moves"]
    assert len(drawn["runs"]) == 1
    (sentence,) = drawn["absent"]
    assert "its record has no traffic" in sentence
    assert of(uncounted)["bars"] == []


def test_a_page_of_what_was_not_counted_has_the_sentence_and_no_bar(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    bare = changed(
        runs["train"], tmp_path / "run", lambda each: [rank.pop("traffic") for rank in each["ranks"]]
    )
    result = report(tmp_path / "report", bare, "--markdown")
    section = moves_of(result)
    assert "its record has no traffic" in section
    assert "<table" not in section
    assert "its record has no traffic" in (result / "report.md").read_text()


def moves_of(result: Path) -> str:
    """The section of the page in `result`."""
    section, _, _ = (result / PAGE).read_text().partition('<section id="moves">')[2].partition("</section>")
    return section


def test_no_text_of_a_transfer_runs_in_the_page(runs: dict[str, Path], tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        for rank in record["ranks"]:
            for row in rank["traffic"]:
                row |= {"operation": HOSTILE, "link": HOSTILE, "group": HOSTILE}
                row["causes"] = [{"name": HOSTILE, "bytes": 7}]

    result = report(tmp_path / "report", changed(runs["train"], tmp_path / "run", change), "--markdown")
    assert HOSTILE not in (result / PAGE).read_text()
    assert moves_of(result).count(html.escape(HOSTILE)) > 4
    assert "<script>" not in (result / "report.md").read_text().replace("\\<script>", "")


def test_every_link_has_a_look_of_its_own_that_is_no_category_s() -> None:
    from harness.record.links import LINKS

    assert [*palette.LINKS] == [*LINKS]
    assert palette.LINKS.keys().isdisjoint(palette.LOOKS)
    assert (
        len(set(palette.LINKS.values()))
        == len({each.colour for each in palette.LINKS.values()})
        == len(LINKS)
    )
    assert len({each.pattern for each in palette.LINKS.values()}) == len(LINKS)
    assert all(f".is-{link} {{" in bars.css() for link in LINKS)


def test_tables_have_a_row_for_each_transfer_and_none_is_zero(runs: dict[str, Path], tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["ranks"][1]["traffic"] = None

    run = changed(runs["train"], tmp_path / "run", change)
    result = report(tmp_path / "report", run, "--csv", "--parquet")
    rows = pyarrow.parquet.read_table(result / "traffic.parquet").to_pylist()
    first = read(runs["train"])["ranks"][0]["traffic"]
    assert [row["bytes"] for row in rows if row["rank"] == 0] == [row["bytes"] for row in first]
    (last,) = [row for row in rows if row["rank"] == 1]
    assert (last["bytes"], last["calls"], last["phase"]) == (None, None, None)
    assert pyarrow.csv.read_csv(result / "traffic.csv").num_rows == len(rows)


def test_markdown_has_a_row_for_each_operation(runs: dict[str, Path], tmp_path: Path) -> None:
    text = (report(tmp_path / "report", runs["train"], "--markdown") / "report.md").read_text()
    (drawn,) = of(read(runs["train"]))["runs"]
    assert all(f"| {' | '.join(cells)} |" in text for cells in drawn["rows"])
