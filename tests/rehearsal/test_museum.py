"""profiles/museum.md: every row is on it with its source, and cheap ones are rehearsed anew."""

from pathlib import Path

import pytest

from harness.config.load import Refusal
from tests.benchmarks import museum
from tests.benchmarks.museum import Change, Row
from tests.pages import installed_as_pinned, pinned

PAGE = (Path(__file__).parents[2] / "profiles" / "museum.md").read_text()
ROWS = museum.rows()
CHEAP = ("ZeRO-1 from 1 GPU to 8, GPT-2's AdamW", "bf16 takes more than fp32, GPT-2, batch 1")

same_versions = pytest.mark.skipif(
    not installed_as_pinned("torch", "transformers", "deepspeed"),
    reason="the page is of the versions in constraints.txt, and others are installed here",
)


def lines() -> dict[str, str]:
    """The lines of the page's table, by the names of their rows."""
    table = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and line[2].isdigit()]
    return {cells[1]: " | ".join(cells) for cells in table}


def row(**fields: object) -> Row:
    given = {"name": "", "source": "", "figure": "peak", "before": [], "after": [], "unit": "GB"}
    return Row(**{**given, **fields})  # type: ignore[arg-type]


def test_the_page_is_of_the_versions_that_the_tests_run_on() -> None:
    assert [line for line in pinned("torch", "transformers", "deepspeed") if line not in PAGE] == []


def test_twenty_rows_or_more_were_rehearsed() -> None:
    assert len(lines()) >= 20


def test_each_row_is_on_the_page_once_or_left_out_for_a_key_that_it_needs() -> None:
    names = [each.name for each in ROWS]
    assert len(set(names)) == len(names)
    left_out = [each.name for each in ROWS if f"- {each.name} ({each.source}): " in PAGE]
    assert sorted([*lines(), *left_out]) == sorted(names)
    assert [each.name for each in ROWS if each.name in left_out and not each.needs] == []


@pytest.mark.parametrize("each", ROWS, ids=lambda each: each.name)
def test_a_row_has_a_source_and_says_what_was_published(each: Row) -> None:
    assert each.source
    assert [*each.before, *each.after]
    assert [bool(each.published), bool(each.times), bool(each.direction)].count(True) == 1
    assert len(each.published) in (0, 2)


def test_a_row_that_disagrees_has_a_reason_on_the_page() -> None:
    disagree = [name for name, line in lines().items() if line.endswith("| no |")]
    sections = {part.splitlines()[0].partition(". ")[2]: part for part in PAGE.split("\n### ")[1:]}
    assert disagree
    assert [name for name in disagree if "Why not: " not in " ".join(sections[name].split())] == []


@same_versions
@pytest.mark.parametrize("name", CHEAP)
def test_a_rehearsal_gives_the_row_on_the_page(name: str) -> None:
    (each,) = [each for each in ROWS if each.name == name]
    on_page = lines()[name]
    assert museum.line(each, int(on_page.split(" | ")[0].strip("| ")), museum.computed(each)) == on_page


@pytest.mark.parametrize(
    ("fields", "found", "agree"),
    [
        (
            {"published": ["2.0", "1.0"]},
            Change(7_000_000_000, 5_900_000_001),
            True,
        ),  # 0.1 is the rounding of both
        ({"published": ["2.0", "1.0"]}, Change(7_000_000_000, 5_899_999_999), False),
        ({"published": ["2", "1"]}, Change(4_000_000_000, 4_000_000_001), False),
        ({"published": ["~54", "~40.5"]}, Change(60_000_000_000, 47_000_000_000), True),
        ({"published": ["~54", "~40.5"]}, Change(60_000_000_000, 47_700_000_000), False),
        ({"published": ["2", "1"], "unit": "GiB"}, Change(2**31, 2**30), True),
        ({"times": "8"}, Change(80, 10), True),
        ({"times": "8"}, Change(80, 11), False),
        ({"direction": "more"}, Change(80, 81), True),
        ({"direction": "more"}, Change(80, 80), False),
        ({"direction": "less"}, Change(80, 81), False),
    ],
)
def test_changes_agree_within_the_rounding_of_what_is_printed(
    fields: dict[str, object], found: Change, agree: bool
) -> None:
    assert museum.agrees(row(**fields), found) is agree


def test_a_refusal_ends_the_command_unless_the_row_says_which_key_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = row(name="one", before=["zero=4"])
    monkeypatch.setattr(museum, "rows", lambda: [refused])
    with pytest.raises(Refusal):
        list(museum.results())
    monkeypatch.setattr(museum, "rows", lambda: [refused._replace(needs=["zero"])])
    ((_, said),) = museum.results()
    assert isinstance(said, str)
    assert "zero" in said
