"""profiles/measured.md: every row that others measured is on it, and a sample of them is rehearsed anew."""

from pathlib import Path
from string import Formatter

import numpy as np
import pytest

from tests.benchmarks import measured
from tests.benchmarks.measured_causes import CAUSES
from tests.benchmarks.measured_experts import tokens_of_experts
from tests.benchmarks.measured_models import MODELS, Model
from tests.benchmarks.measured_rows import HELD_OUT, Row, read
from tests.benchmarks.philox import Generator, philox
from tests.pages import installed_as_pinned, pinned

PAGE = Path(__file__).parents[2] / "profiles" / "measured.md"
ROWS, ROWS_HELD_OUT = read(), read(HELD_OUT)
PROCESSES = measured.processes([*ROWS, *ROWS_HELD_OUT])
COSTLY = "fused_moe"
"""Takes minutes; the rest, together, seconds."""

on_the_page = pytest.mark.skipif(
    not installed_as_pinned("torch", "transformers"),
    reason="the page is of the versions in constraints.txt, and others are installed here",
)


def lines() -> list[str]:
    """The page's."""
    return PAGE.read_text().splitlines()


@on_the_page
def test_the_page_is_of_the_versions_that_the_tests_run_on() -> None:
    assert [each for each in pinned("torch", "transformers") if each not in PAGE.read_text()] == []


@on_the_page
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(rows, marks=pytest.mark.exhaustive) if rows[0].kernel == COSTLY else rows
        for rows in PROCESSES
    ],
    ids=lambda rows: "-".join((rows[0].kernel, *measured.case(rows[0])[1:])),
)
def test_a_rehearsal_gives_the_rows_on_the_page(rows: list[Row]) -> None:
    assert [line for line in map(measured.line, measured.rehearse(rows)) if line not in lines()] == []


def results(rows: list[Row]) -> list[measured.Result]:
    """Each of `rows` with what the page says that its rehearsal had. Raises ValueError for one not there once."""
    text = PAGE.read_text()
    actual = []
    for row in rows:
        (section,) = [part for part in text.split("\n### ") if part.startswith(f"{row.kernel}\n")]
        start = measured.cells(*measured.case(row), f"{row.published:,}").removesuffix("|")
        (line,) = [each for each in section.splitlines() if each.startswith(start)]
        actual.append(measured.Result(row, int(line.split(" | ")[5].replace(",", ""))))
    return actual


def test_every_row_is_on_the_page_and_the_page_says_of_it_what_its_figures_say() -> None:
    for kernel, group in measured.by_kernel(results([*ROWS, *ROWS_HELD_OUT])):
        assert measured.kernel_section(kernel, group) in PAGE.read_text()


@pytest.mark.parametrize("rows", [ROWS, ROWS_HELD_OUT], ids=["rows", "held out"])
def test_the_summary_counts_the_rows(rows: list[Row]) -> None:
    assert measured.totals(results(rows)) in lines()
    assert measured.summary(results(rows)) in PAGE.read_text()


@on_the_page
@pytest.mark.parametrize("model", MODELS[:2], ids=lambda model: model.case)
def test_a_rehearsal_gives_the_whole_model_on_the_page(model: Model) -> None:
    assert measured.model_line(model, model.program()) in lines()


def test_every_whole_model_is_on_the_page_with_the_difference_of_its_figures() -> None:
    for model in MODELS:
        start = measured.cells(model.source, model.case, f"{model.published:,}").removesuffix("|")
        (line,) = [each for each in lines() if each.startswith(start)]
        assert line == measured.model_line(model, int(line.split(" | ")[3].replace(",", "")))
    assert measured.unexpressed() in PAGE.read_text()


def test_the_sentences_are_those_of_the_command() -> None:
    assert [text for text, *_ in Formatter().parse(measured.PAGE) if text not in PAGE.read_text()] == []


def test_a_published_figure_stands_for_all_bytes_that_float32_rounds_to_it() -> None:
    (row,) = [row for row in ROWS if row.kernel == "rope" and row.x_value == 512]
    least, most = row.interval
    assert [
        np.float32(count / 2**20) == np.float32(row.peak_mib) for count in (least - 1, least, most, most + 1)
    ] == [*(False, True, True, False)]


def test_philox_gives_the_words_that_its_authors_publish() -> None:
    words = [int(word[0]) for word in philox(0, 0, np.zeros(1, dtype=np.uint64))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_a_seed_gives_the_normal_numbers_that_torch_prints_on_cuda() -> None:
    assert Generator(42, multiprocessors=132).normals(6).round(4).tolist() == pytest.approx(
        [0.1940, 2.1614, -0.1721, 0.8491, -1.9244, 0.6530]
    )


def test_the_tokens_of_all_experts_are_all_that_the_router_sent() -> None:
    (row,) = [row for row in ROWS if row.kernel == "fused_moe" and row.mode == "full" and row.x_value == 8]
    assert sum(tokens_of_experts(row)) == row.size("T") * row.size("K")


def test_a_kernel_without_a_miss_has_no_cause() -> None:
    missing = {result.row.kernel for result in results([*ROWS, *ROWS_HELD_OUT]) if not result.exact}
    assert missing == CAUSES.keys()
