"""The numbers of profiles/estimates.md, computed anew.

All that others estimate is. Of the rehearsals these are: the tiny model's, and of the large ones `REHEARSED`; the rest
takes minutes. Real runs are held against rehearsals in tests/distributed.
"""

from pathlib import Path
from string import Formatter

import pytest

from tests.benchmarks import estimates
from tests.pages import installed_as_pinned, pinned

PAGE = (Path(__file__).parents[2] / "profiles" / "estimates.md").read_text()
REHEARSED = (("llama2-7b", 64, 3),)

pytestmark = pytest.mark.skipif(
    not installed_as_pinned("torch", "deepspeed", "transformers", "accelerate"),
    reason="the page is of the versions in constraints.txt, and others are installed here",
)


def test_the_page_is_of_the_versions_that_the_tests_run_on() -> None:
    assert [
        line for line in pinned("torch", "deepspeed", "transformers", "accelerate") if line not in PAGE
    ] == []


def cells(*first: object) -> list[str]:
    """The cells of the page's row that begins with these, without them."""
    start = estimates.row(*first).removesuffix("|")
    (actual,) = [line for line in PAGE.splitlines() if line.startswith(start)]
    return actual.removeprefix(start).strip(" |").split(" | ")


@pytest.mark.parametrize("case", list(estimates.cases()), ids=str)
def test_others_estimates_of_a_large_model_are_those_on_the_page(case: tuple[str, int, int]) -> None:
    model, world, stage = case
    computed = estimates.estimates(model, stage, world)
    assert cells(*case)[:3] == [*map(estimates.gigabytes, computed)]


@pytest.mark.parametrize("case", REHEARSED, ids=str)
def test_a_large_rehearsal_gives_the_row_on_the_page(case: tuple[str, int, int]) -> None:
    assert estimates.large(*case) in PAGE.splitlines()


@pytest.mark.parametrize("stage", estimates.STAGES)
def test_a_tiny_rehearsal_gives_the_bytes_on_the_page(stage: int) -> None:
    others, actual = (
        estimates.estimates("tiny", stage, 2),
        estimates.rehearsed("tiny", stage, 2, estimates.SHORT),
    )
    row = cells("tiny", stage)
    assert row[:4] == [*map(estimates.exact, (*others, actual.states))]
    assert row[5] == estimates.exact(actual.peak)


def test_the_sentences_are_those_of_the_command() -> None:
    sentences = [text for text, *_ in Formatter().parse(estimates.PAGE)]
    assert [text for text in sentences if text not in PAGE] == []


def test_each_stage_of_the_paper_splits_one_more_kind_of_state() -> None:
    figures = [round(estimates.paper(7_500_000_000, stage, 64) / 1e9, 1) for stage in estimates.STAGES]
    assert figures == [120, 31.4, 16.6, 1.9]  # the paper's figure 1


def test_page_says_what_the_paper_deepspeed_and_a_rehearsal_say_of_llama2_70b_on_64_ranks() -> None:
    assert cells("DeepSpeed's, 500,000,000") == ["17.24", "18.25", "20.45"]
