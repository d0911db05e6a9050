"""Public savings and regressions of memory, each a pair of configs that is rehearsed, beside what was published.

    python -m tests.benchmarks.museum > profiles/museum.md

Prints a page of the rows in `museum.yaml`. With names of rows it prints only their lines. Takes some minutes.
`tests/rehearsal/test_museum.py` holds the committed page against some of what is computed anew.
"""

import platform
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from harness.config.compose import compose
from harness.config.load import Refusal, load
from harness.model.plan import Plan
from harness.record import record_file
from harness.record.memory import Rank
from harness.rehearsal import one_rank

FILE = Path(__file__).with_name("museum.yaml")
UNITS = {"B": 1, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
STATES = ("parameters", "gradients", "optimizer")
"""What the ZeRO paper calls model states."""
PASSES = ("forward", "backward")


class Row(NamedTuple):
    """A published change of memory and the pair of configs that should show it.

    `published` are the figures as printed, without their unit: before and after. Where a source says less, there are
    `times` that it became smaller, or only a `direction`, "less" or "more".
    `figure` is what is compared, each at its most: `peak`, all live bytes; `passes`, the same in forward and backward
    alone; `reserved`, a GPU's allocator's; `states`, the sum of three categories; or a category.
    `needs` names the keys without which a checkout refuses the configs. `assumed` is what the source does not say.
    `reason` says why both changes differ by more than the rounding of what is printed; it may be "unexplained".
    """

    name: str
    source: str
    figure: str
    before: Sequence[str]
    after: Sequence[str]
    published: Sequence[str] = ()
    unit: str = "GiB"
    unit_is: str = ""
    times: str = ""
    direction: str = ""
    both: Sequence[str] = ()
    needs: Sequence[str] = ()
    assumed: str = ""
    reason: str = ""


class Change(NamedTuple):
    """Bytes before and after."""

    before: int
    after: int

    @property
    def difference(self) -> int:
        return self.after - self.before


def tables() -> dict[str, Any]:
    """All of the file, as plain lists and dicts."""
    return OmegaConf.to_container(OmegaConf.load(FILE))  # type: ignore[return-value]


def rows() -> list[Row]:
    """The rows, with each name of a list of overrides, as `@train`, replaced by that list."""
    given = tables()
    lists: dict[str, list[str]] = given["overrides"]

    def whole(words: Sequence[str]) -> list[str]:
        return [each for word in words for each in (whole(lists[word[1:]]) if word[0] == "@" else [word])]

    return [
        Row(**{**row, **{side: whole(row.get(side, [])) for side in ("both", "before", "after")}})
        for row in given["rows"]
    ]


@cache
def rehearsed(*words: str) -> Rank:
    """Rank 0 of a config. Raises Refusal."""
    return one_rank.rehearse(Plan.of(load(compose(words))), 0)[0]


def figure(rank: Rank, name: str) -> int:
    """Bytes of the figure `name`, as `Row` says it. Setup, where weights may lie twice, is in `reserved` alone."""
    phases = [phase for phase in rank.phases if phase.phase != "setup"]
    if name == "reserved":
        return rank.peak.reserved or 0
    if name == "peak":
        return max(phase.peak or 0 for phase in phases)
    if name == "passes":
        return max(phase.peak or 0 for phase in phases if phase.phase in PASSES)
    if name in ("states", "parameters"):
        names = STATES if name == "states" else (name,)
        return max(sum(phase.categories[each] or 0 for each in names) for phase in phases)
    return rank.highest[name] or 0


def computed(row: Row) -> Change:
    """What the rehearsals of both configs say. Raises Refusal."""
    sides = [(*row.both, *words) for words in (row.before, row.after)]
    for words in sides:
        load(compose(words))  # a refusal comes before anything is rehearsed
    before, after = (figure(rehearsed(*words), row.figure) for words in sides)
    return Change(before, after)


def rounding(printed: str) -> float:
    """Half of a unit of the last digit of a printed figure, or a whole one where `~` says that it is approximate."""
    decimals = len(printed.partition(".")[2])
    return (1.0 if printed[0] == "~" else 0.5) * 10.0**-decimals


def agrees(row: Row, found: Change) -> bool:
    """Whether the change that was computed is the published one, within the rounding of the printed figures."""
    if row.direction:
        return (found.difference > 0) == (row.direction == "more") and found.difference != 0
    if row.times:
        return abs(found.before / found.after - number(row.times)) <= rounding(row.times)
    before, after = map(number, row.published)
    may_be = sum(map(rounding, row.published)) * UNITS[row.unit]
    return abs(found.difference - (after - before) * UNITS[row.unit]) <= may_be


def share(row: Row, found: Change) -> float | None:
    """The change that was computed by the published one. None: there is no figure of that, or no change in it."""
    if row.times:
        return found.before / found.after / number(row.times)
    published = number(row.published[1]) - number(row.published[0]) if row.published else 0
    return found.difference / UNITS[row.unit] / published if published else None


def number(printed: str) -> float:
    return float(printed.lstrip("~"))


COLUMNS = ("", "what changes", "figure", "published", "change", "rehearsed", "change", "of it", "agrees")


def line(row: Row, index: int, found: Change) -> str:
    """A row of the page's table."""
    cells = (
        str(index),
        row.name,
        row.figure,
        *said(row),
        f"{amount(row, found.before)} to {amount(row, found.after)} {row.unit}",
        changed(row, found),
        "" if (part := share(row, found)) is None else f"{part:.0%}",
        "yes" if agrees(row, found) else "no",
    )
    return f"| {' | '.join(cells)} |"


def said(row: Row) -> tuple[str, str]:
    """What was published, and the change in it."""
    if row.direction:
        return "no figure", row.direction
    if row.times:
        return "no figure", f"{row.times} times less"
    before, after = row.published
    return f"{before} to {after} {row.unit}", f"{signed(number(after) - number(before), row)} {row.unit}"


def changed(row: Row, found: Change) -> str:
    if row.times:
        return f"{found.before / found.after:.2f} times less"
    return f"{signed(found.difference / UNITS[row.unit], row)} {row.unit}"


def places(row: Row) -> int:
    """Decimals of a figure: as many as are printed, and two at least where the unit is large."""
    printed = max((len(each.partition(".")[2]) for each in row.published), default=0)
    return max(printed, 2 if row.unit in ("GB", "GiB") else 0)


def signed(value: float, row: Row) -> str:
    return f"{value:+,.{places(row)}f}"


def amount(row: Row, count: int) -> str:
    return f"{count / UNITS[row.unit]:,.{places(row)}f}"


def note(row: Row, index: int, agreed: bool) -> str:
    """Where a row's figures are from, what its configs are, and why it disagrees."""
    texts = [f"Source: {row.source}."]
    if row.unit_is:
        texts.append(f"Unit: {row.unit_is}.")
    if row.assumed:
        texts.append(f"Assumed: {row.assumed}.")
    if row.reason and not agreed:
        texts.append(f"Why not: {row.reason}.")
    configs = "\n".join(
        f"    {side}: {' '.join(words)}"
        for side, words in (("both", row.both), ("before", row.before), ("after", row.after))
        if words
    )
    return f"### {index}. {row.name}\n\n{fill(' '.join(texts), 120)}\n\n{configs}\n"


PAGE = """\
# Savings and regressions that others published

Made by `python -m tests.benchmarks.museum > profiles/museum.md`,
and checked by `tests/rehearsal/test_museum.py`.
Python {python}, {packages}.

Each row is a pair of configs. What the rehearsal of both predicts stands beside what was published: by a paper, a
thread or a document. They agree where the two changes differ by no more than the rounding of the printed figures.
{agreeing} of {all} do; {near} of the others are within a tenth of the published change. Where they do not agree, the
reason is below, or *unexplained*. No figure here is fitted to a row.

Figures are of rank 0, each at its most: `peak` is all live bytes, `passes` the same in forward and backward alone,
`states` parameters, gradients and the optimizer's together, `reserved` what a GPU's allocator has; others are
categories. What a checkpoint's or an engine's setup takes for a while is in `reserved` alone.

{table}

## The rows

{notes}
{left_out}## Not expressible here

{unexpressed}
"""

LEFT_OUT = """\
## Left out

These need keys that this checkout's config refuses:

{lines}

"""


def results() -> Iterator[tuple[Row, Change | str]]:
    """Each row with what was computed, or, where it `needs` a key, with the config's refusal."""
    for row in rows():
        try:
            yield row, computed(row)
        except Refusal as refusal:
            if not row.needs:
                raise
            yield row, str(refusal).splitlines()[0]


def page() -> str:
    """All of it."""
    every = list(results())
    done = [(row, found) for row, found in every if isinstance(found, Change)]
    absent = [f"- {row.name} ({row.source}): {said}" for row, said in every if isinstance(said, str)]
    packages = record_file.environment().packages
    numbered = [(index, row, found) for index, (row, found) in enumerate(done, 1)]
    head = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"
    return PAGE.format(
        python=platform.python_version(),
        packages=", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "deepspeed")),
        agreeing=sum(agrees(row, found) for row, found in done),
        all=len(done),
        near=sum(not agrees(*each) and abs((share(*each) or 0) - 1) <= 0.1 for each in done),
        table="\n".join([head, *(line(row, index, found) for index, row, found in numbered)]),
        notes="\n".join(note(row, index, agrees(row, found)) for index, row, found in numbered),
        left_out=LEFT_OUT.format(lines="\n".join(absent)) if absent else "",
        unexpressed="\n".join(f"- {what}: {why}." for what, why in tables()["unexpressed"].items()),
    )


def main(names: Sequence[str]) -> None:
    if not names:
        print(page(), end="")
    for index, row in enumerate(rows(), 1):
        if any(name in row.name for name in names):
            print(line(row, index, computed(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
