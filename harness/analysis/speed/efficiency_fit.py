"""The efficiencies of `efficiency.py`, fitted on rows that others published.

Rows in which one class takes most of the time at best give that class's: the median over runs of each run's median, by
the work of a call. A run is one benchmark on one GPU. With each run left out in turn, the efficiency of the others
predicts its rows; the lowest and the highest of true / predicted are the error. A class and size of which fewer than
two runs are known has none.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from harness.analysis.speed.efficiency import (
    COMMITTED,
    COMPUTING,
    EDGES,
    FAMILY,
    Amount,
    Efficiency,
    Fit,
    LinkEfficiency,
    at_best,
    size,
)
from harness.config import hardware_page
from harness.record.ceilings import of_page
from harness.record.results import Ceilings

PURE = 0.85
"""The share of the time at best from which on a row is of one class."""
SEEN = 0.15
"""The share of the time at best from which on a row shows that a class runs on its GPU as on others."""

PAGES = {
    "A100": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA B200": "b200",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "sm_90": "h100-sxm",
}
"""The page of each GPU, by the name that the rows give it."""

OVER_ITS_PAGE = ("rtx4090",)
"""Pages whose GPU computes products faster than their rate says: their rows tell nothing about computing."""


class Timed(NamedTuple):
    """A row: its run, the page of its GPU, the seconds published and the work counted, by class."""

    run: str
    page: str
    seconds: float
    work: Mapping[str, Amount]


def rows(path: Path) -> list[Timed]:
    """The rows of the file at `path`."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Timed(
                f"{line['source']} {line['path']} {line['kernel']} {line['gpu']}",
                PAGES[line["gpu"]],
                float(line["seconds"]),
                {name: Amount(*figures) for name, figures in json.loads(line["work"]).items()},
            )
            for line in csv.DictReader(file)
        ]


class _Seen(NamedTuple):
    """What a row says of one class: its share of the time at best, the row's efficiency, the size of a call."""

    row: Timed
    name: str
    share: float
    efficiency: float
    size: float


def _seen(row: Timed) -> list[_Seen]:
    ceilings = of_page(hardware_page.named(row.page), "bfloat16") or Ceilings()
    best = {name: at_best(name, amount, ceilings) for name, amount in row.work.items()}
    whole = sum(best.values())
    return [
        _Seen(row, name, seconds / whole, whole / row.seconds, size(name, row.work[name]))
        for name, seconds in best.items()
        if seconds
    ]


def fit(timed: Iterable[Timed]) -> Fit:
    """The efficiencies that these rows give."""
    seen = [each for row in timed for each in _seen(row)]
    pure = [each for each in seen if each.share >= PURE]
    small = [
        each.row.seconds / sum(amount.calls for amount in each.row.work.values())
        for each in pure
        if each.name not in COMPUTING and each.size < EDGES["elementwise"][0]
    ]
    classes: dict[str, list[Efficiency]] = {}
    for name, edges in EDGES.items():
        chips = {
            FAMILY[each.row.page]
            for each in seen
            if each.name == name and each.share >= SEEN and each.row.page in FAMILY
        }
        for least, most in pairwise(edges):
            inside = [
                each
                for each in pure
                if each.name == name
                and least <= each.size < most
                and not (name in COMPUTING and each.row.page in OVER_ITS_PAGE)
            ]
            if (found := _of_bucket(inside, least, most, chips)) is not None:
                classes.setdefault(name, []).append(found)
    return Fit(classes, min(each.efficiency for each in pure), median(small))


def _of_bucket(inside: Sequence[_Seen], least: float, most: float, chips: set[str]) -> Efficiency | None:
    """The efficiency of these rows, and its error on each run by the others. None for fewer than two runs."""
    by_run: dict[str, list[float]] = {}
    for each in inside:
        by_run.setdefault(each.row.run, []).append(each.efficiency)
    found = spread(by_run)
    if found is None:
        return None
    return Efficiency(least, most, *found, len(inside), len(by_run), tuple(sorted(chips)))


def spread(by_run: Mapping[str, Sequence[float]]) -> tuple[float, float, float] | None:
    """The median over runs of each one's median; and the lowest and the highest true / predicted of a row's seconds,
    predicted by the other runs. None for fewer than two runs.
    """
    if len(by_run) < 2:
        return None
    middle = {run: median(values) for run, values in by_run.items()}
    apart = [
        median(other for name, other in middle.items() if name != run) / value
        for run, values in by_run.items()
        for value in values
    ]
    return median(middle.values()), min(apart), max(apart)


def write(fitted: Fit, path: Path = COMMITTED) -> None:
    """Write `fitted` as JSON, its figures to four digits."""
    path.write_text(json.dumps(as_json(fitted), indent=1) + "\n")


def as_json(fitted: Fit) -> dict[str, object]:
    """`fitted` as plain data; null: no upper limit."""

    def short(figure: object) -> object:
        if isinstance(figure, float):
            return None if figure == float("inf") else float(f"{figure:.4g}")
        return list(figure) if isinstance(figure, tuple) else figure

    def plain(efficiencies: Sequence[Efficiency] | Sequence[LinkEfficiency]) -> list[dict[str, object]]:
        return [{key: short(figure) for key, figure in each._asdict().items()} for each in efficiencies]

    return {
        "classes": {name: plain(efficiencies) for name, efficiencies in fitted.classes.items()},
        "links": plain(fitted.links),
        "worst": short(fitted.worst),
        "launch": short(fitted.launch),
    }
