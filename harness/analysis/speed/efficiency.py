"""How fast each class of operators runs, as a share of the machine's peak rates, fitted on what others published.

An efficiency is the seconds at best over the seconds published. `efficiency_fit.py` makes it from the rows in
`profiles/speed`, and `python -m tests.benchmarks.speed fit` writes it into `COMMITTED`, which comes with the package.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from harness.record.results import Ceilings

COMMITTED = Path(__file__).with_name("efficiency.json")

COMPUTING = ("matmul", "flash attention", "cuDNN attention")
"""The classes that a device's operations per second bound. Their size is in operations, of the others in bytes."""

EDGES = {
    **dict.fromkeys(COMPUTING, (64e9, float("inf"))),
    "elementwise": (16e6, 64e6, float("inf")),
    "loss": (16e6, float("inf")),
    "lookup": (16e6, float("inf")),
    "normalization": (16e6, float("inf")),
}
"""The sizes of a call that have an efficiency of their own. Below the first, launching a kernel counts as much."""

FAMILY = {
    "a100-40gb": "A100",
    "a100-80gb": "A100",
    "h100-pcie": "H100 PCIe",
    "h100-sxm": "H100",
    "h200": "H100",
}
"""The chip of each page on which an estimate may be made."""

SIZES = (*(4**power for power in range(8, 15)), float("inf"))
"""The bytes of a collective that have an efficiency of their own: from 64 KiB on."""

KINDS = {
    "all-reduce": "all-reduce",
    "all-gather": "all-gather, reduce-scatter",
    "reduce-scatter": "all-gather, reduce-scatter",
    "all-to-all": "all-to-all",
}
"""The operations of which there are rows, by kind: a reduce-scatter is an all-gather backwards."""

GROUPS = {"nvlink": ((2, 2), (4, 4), (8, 8)), "network": ((16, 32),)}
"""The ranks of groups that have an efficiency of their own, by link; on the network all ranks of their nodes."""

PER_NODE = 8
"""The ranks of a node in the rows of networks."""


class Amount(NamedTuple):
    """The work of one class: operations, bytes read and written, and calls."""

    flops: float
    moved: float
    calls: float


class Efficiency(NamedTuple):
    """The share of the peak rate that calls of a class reach whose size is from `least` to below `most`.

    The seconds it gives held within `low` to `high` times on runs that were left out. `chips` have rows with the class.
    """

    least: float
    most: float
    share: float
    low: float
    high: float
    rows: int
    runs: int
    chips: tuple[str, ...]


class LinkEfficiency(NamedTuple):
    """The share of a link's rate that collectives of a kind reach: of `least` to below `most` bytes a call, in groups
    of `fewest` to `largest` ranks. The rest is as in `Efficiency`.
    """

    link: str
    kind: str
    least: float
    most: float
    fewest: int
    largest: int
    share: float
    low: float
    high: float
    rows: int
    runs: int
    chips: tuple[str, ...]


class Fit(NamedTuple):
    """The efficiencies of each class; the least efficiency of any row; the seconds that a small call takes; and the
    efficiencies of links.
    """

    classes: Mapping[str, Sequence[Efficiency]]
    worst: float
    launch: float
    links: Sequence[LinkEfficiency] = ()


def at_best(name: str, amount: Amount, ceilings: Ceilings) -> float:
    """The least seconds for so much work of a class. The ceilings must be known."""
    assert ceilings.bandwidth is not None
    assert ceilings.flops is not None
    moving = amount.moved / ceilings.bandwidth
    return max(amount.flops / ceilings.flops, moving) if name in COMPUTING else moving


def size(name: str, amount: Amount) -> float:
    """The mean size of a call: operations or bytes."""
    return (amount.flops if name in COMPUTING else amount.moved) / amount.calls


@cache
def committed() -> Fit:
    """The fit that comes with this version."""
    tree = json.loads(COMMITTED.read_text())
    classes = {
        name: [Efficiency(**_read(each)) for each in efficiencies]
        for name, efficiencies in tree["classes"].items()
    }
    links = [LinkEfficiency(**_read(each)) for each in tree["links"]]
    return Fit(classes, tree["worst"], tree["launch"], links)


def _read(each: dict[str, Any]) -> dict[str, Any]:
    most = float("inf") if each["most"] is None else each["most"]
    return {**each, "most": most, "chips": tuple(each["chips"])}
