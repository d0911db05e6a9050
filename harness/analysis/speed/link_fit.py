"""How fast collectives use a link, as a share of its page's rate, fitted on what others measured.

A row is a collective of one size in one group: its efficiency is the bytes that each rank sends by ring, over seconds,
over the link's rate in one direction: NCCL's bus bandwidth over the rate. On NVLink that is a GPU's rate, on the
network a node's. An efficiency can be above 1: a switch that reduces, and a tree of two nodes, send less than a ring.

The efficiency of a link, operation, size and group is the median over runs of each run's median. A run is one file of
measurements on one kind of machine. The error is that of the others on each run, as in `efficiency_fit.py`, and fewer
than two runs have none.
"""

import csv
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from harness.analysis.speed.efficiency import FAMILY, GROUPS, KINDS, SIZES, LinkEfficiency
from harness.analysis.speed.efficiency_fit import spread
from harness.config import hardware_page, network_page
from harness.record.links import NETWORK, SHARED, TWICE


class Sent(NamedTuple):
    """A row: its run, link and chip, the operation, its payload in bytes among `ranks`, and the link's efficiency."""

    run: str
    link: str
    chip: str
    operation: str
    nbytes: int
    ranks: int
    efficiency: float


def rows(path: Path) -> list[Sent]:
    """The rows of the file at `path`. Each has its seconds, or its bus bandwidth in bytes a second."""
    with path.open(encoding="utf-8", newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: dict[str, str]) -> Sent:
    page, operation, nbytes, ranks = (
        line["page"],
        line["operation"],
        int(line["bytes"]),
        int(line["ranks"]),
    )
    card, network = hardware_page.named(page), line["network"]
    link, rate = (NETWORK, network_page.named(network).of_node) if network else (card.link_kind, card.between)
    assert link is not None
    assert rate is not None
    bandwidth = (
        float(line["busbw"]) if line["busbw"] else _by_ring(operation, nbytes, ranks) / float(line["seconds"])
    )
    run = " ".join(line[name] for name in ("source", "path", "gpu", "network"))
    return Sent(run, link, FAMILY.get(page, page), operation, nbytes, ranks, bandwidth / rate)


def _by_ring(operation: str, nbytes: int, ranks: int) -> float:
    assert operation in (*TWICE, *SHARED)
    return (2 if operation in TWICE else 1) * nbytes * (ranks - 1) / ranks


def fit(sent: Iterable[Sent]) -> list[LinkEfficiency]:
    """The efficiencies that these rows give."""
    measured = [*sent]
    found: list[LinkEfficiency] = []
    for link, groups in GROUPS.items():
        for kind in dict.fromkeys(KINDS.values()):
            for fewest, most in groups:
                inside = [
                    each
                    for each in measured
                    if each.link == link and KINDS[each.operation] == kind and fewest <= each.ranks <= most
                ]
                found += _of_group(link, kind, inside)
    return found


def _of_group(link: str, kind: str, inside: list[Sent]) -> Iterable[LinkEfficiency]:
    for least, most in pairwise(SIZES):
        own = [each for each in inside if least <= each.nbytes < most]
        by_run: dict[str, list[float]] = {}
        for each in own:
            by_run.setdefault(each.run, []).append(each.efficiency)
        if (found := spread(by_run)) is not None:
            ranks = [each.ranks for each in own]
            chips = tuple(sorted({each.chip for each in own}))
            yield LinkEfficiency(
                link, kind, least, most, min(ranks), max(ranks), *found, len(own), len(by_run), chips
            )
