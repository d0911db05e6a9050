"""What is alive at a moment, by name. Plain data in and out."""

from collections.abc import Iterable
from dataclasses import dataclass

from harness.ledger.categories import CATEGORIES
from harness.ledger.log import Storage

LARGEST = 40
"""Holdings of a peak that are named one by one."""


@dataclass(frozen=True)
class Holding:
    """Storages alive at the peak under one name: an owner's, or the module and operator that made them.

    A parameter that lies in a buffer of many is one of its own.
    """

    category: str
    name: str
    bytes: int
    storages: int
    line: str = ""
    """Of the source that made them, where the log asked for lines."""


def holdings_of(storages: Iterable[Storage]) -> list[Holding]:
    """`storages` by what holds them, the `LARGEST` first, then what is left of each category. The sum is theirs."""
    held: dict[tuple[str, str, str], list[int]] = {}
    for storage in storages:
        made = f"{storage.module or storage.where.phase}: {storage.op.partition('.')[0]}"
        for name, nbytes in storage.shares:
            held.setdefault((storage.category, name or made, storage.line), []).append(nbytes)
    found = [
        Holding(category, name, sum(sizes), len(sizes), line)
        for (category, name, line), sizes in held.items()
    ]
    found.sort(key=lambda holding: (-holding.bytes, holding.category, holding.name, holding.line))
    shown, rest = found[:LARGEST], found[LARGEST:]
    for category in CATEGORIES:
        left = [holding for holding in rest if holding.category == category]
        if left:
            total, count = sum(h.bytes for h in left), sum(h.storages for h in left)
            shown.append(Holding(category, "others", total, count))
    return shown
