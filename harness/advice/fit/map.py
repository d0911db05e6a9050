"""The answer of `harness fit` as a page: a map of what fits, by the searched key and by the length."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.advice.fit.answer import Answer
from harness.advice.fit.climb import DOUBLING
from harness.advice.fit.combination import Combination, Trial, short
from harness.advice.fit.text import notes, reason_of
from harness.analysis import bars
from harness.analysis.bars import Bar, stacked
from harness.tables import size

HERE = Path(__file__).parent

LENGTHS = ("train.sequence", "generation.prompt_length")
"""The axes that are the rows of a map of their own, where they have several values."""

SIGNS = {
    "fits": "\u2713",
    "too-much": "\u2717",
    "needless": "\u2212",
    "unknown": "?",
}
"""By verdict, the sign in a cell: colour is never the only one."""


class Cell(NamedTuple):
    """One config: its `verdict`, a key of SIGNS; its bytes, with `about` or `at least` before them where it was not
    rehearsed; what fills it.
    """

    verdict: str
    told: str
    filled_by: str
    bar: Bar
    rehearsed: bool = False
    largest: bool = False
    title: str = ""

    @property
    def sign(self) -> str:
        """The verdict as a sign."""
        return SIGNS[self.verdict]


class Row(NamedTuple):
    """A combination, or one of its lengths, with a cell for each column."""

    label: str
    largest: str
    cells: list[Cell]


class Map(NamedTuple):
    """A table: its caption, what the rows are, and the rows."""

    caption: str
    rows_are: str
    rows: list[Row]


def html(answer: Answer) -> str:
    """The map as an HTML page that opens from disk, loads nothing from a network, and escapes every text."""
    from markupsafe import Markup

    request = answer.request
    columns = columns_of(answer)
    maps = list(maps_of(answer, columns))
    names = bars.present(
        [categories_of(each, value) or {} for each in answer.combinations for value in columns]
    )
    return (
        bars.templates(HERE)
        .get_template("map.html")
        .render(
            settings=request.first,
            request=request,
            command=answer.command(),
            columns=columns,
            maps=maps,
            names=names,
            signs=SIGNS,
            notes=notes(answer),
            interrupted=answer.interrupted,
            css=Markup((HERE / "map.css").read_text("utf-8")),
            looks=Markup(bars.css()),
        )
    )


def columns_of(answer: Answer) -> list[int]:
    """The values of the searched key that the map has: the user's, or the powers of two up to one that is too much."""
    if answer.request.values:
        return answer.request.values
    tried = max((trial.value for trial in answer.trials), default=1)
    return [value for value in DOUBLING if value < 2 * tried]


def maps_of(answer: Answer, columns: Sequence[int]) -> list[Map]:
    """One map with a row for each combination; or one for each combination of the rest, with a row for each length."""
    axis = next((key for key in LENGTHS if "," in answer.request.axes.get(key, "")), None)
    if axis is None:
        rows = [
            row_of(each, " ".join(short(each.overrides)) or "all", columns) for each in answer.combinations
        ]
        return [Map("", "", rows)]

    by_rest: dict[tuple[str, ...], list[Row]] = {}
    for each in answer.combinations:
        (length,) = (override for override in each.overrides if override.startswith(f"{axis}="))
        rest = tuple(override for override in each.overrides if override != length)
        by_rest.setdefault(rest, []).append(row_of(each, length.partition("=")[2], columns))
    return [Map(" ".join(short(rest)), axis, rows) for rest, rows in by_rest.items()]


def row_of(combination: Combination, label: str, columns: Sequence[int]) -> Row:
    """The row of a combination."""
    largest = combination.largest
    return Row(
        label, str(largest.value) if largest else "-", [cell_of(combination, each) for each in columns]
    )


def cell_of(combination: Combination, value: int) -> Cell:
    """The cell of a combination with a value: rehearsed, or what is known of it otherwise."""
    trial = _trial(combination, value)
    if trial is not None and not trial.known:
        return Cell("unknown", "not rehearsed", "", Bar([], ""), title=reason_of(trial))
    categories = categories_of(combination, value)
    total = sum((categories or {}).values())
    if categories is None:
        return Cell("unknown", "not known", "", Bar([], ""))
    rehearsed = trial is not None and trial.rehearsed
    more = "" if rehearsed else "at least " if _bound(combination, value) else "about "
    largest = combination.largest
    return Cell(
        _verdict(combination, value),
        f"{more}{size(total)}",
        max(categories, key=lambda name: categories[name], default=""),
        stacked(categories, total, combination.room),
        rehearsed,
        largest is not None and largest.value == value,
    )


def categories_of(combination: Combination, value: int) -> dict[str, int] | None:
    """The bytes by category with a value, those that a GPU's allocator only reserves as `slack`; None if not known."""
    trial = _trial(combination, value)
    if trial is not None and trial.rehearsed:
        categories = trial.worst.categories
        return categories | {"slack": trial.worst.needs - sum(categories.values())}
    bound = _bound(combination, value)
    return bound.worst.categories if bound else combination.expected(value)


def _trial(combination: Combination, value: int) -> Trial | None:
    return next((trial for trial in combination.trials if trial.value == value), None)


def _bound(combination: Combination, value: int) -> Trial | None:
    """What is the least that `value` needs, where nothing was rehearsed that lets expect more."""
    if any(trial.rehearsed for trial in combination.trials):
        return None
    return next((trial for trial in combination.trials if trial.worst.bound and trial.value <= value), None)


def _verdict(combination: Combination, value: int) -> str:
    """Whether a value fits: as was rehearsed, or because a larger one does or a smaller one does not."""
    climb = combination.climb
    if value <= climb.fits:
        return "fits"
    if climb.fails is not None and value >= climb.fails:
        return "too-much"
    return "needless" if value <= climb.needless else "unknown"
