"""What is alive at a moment, by name. Plain data in and out."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from harness.ledger.categories import CATEGORIES, pattern
from harness.ledger.events import Storage

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
    """`storages` by what holds them: the `LARGEST`, then those of all layers as one, then the rest of each category.

    The sum is theirs.
    """
    held: dict[tuple[str, str, str], list[int]] = {}
    for storage in storages:
        made = f"{storage.module or storage.where.phase}: {storage.op.partition('.')[0]}"
        for name, nbytes in storage.shares:
            held.setdefault((storage.category, name or made, storage.line), []).append(nbytes)
    found = _by_size(
        Holding(category, name, sum(sizes), len(sizes), line)
        for (category, name, line), sizes in held.items()
    )
    layers = _by_size(_together(found[LARGEST:], lambda holding: pattern(holding.name)))
    left = list(_together(layers[LARGEST:], lambda holding: "others"))
    return [
        *found[:LARGEST],
        *layers[:LARGEST],
        *sorted(left, key=lambda each: CATEGORIES.index(each.category)),
    ]


def _by_size(holdings: Iterable[Holding]) -> list[Holding]:
    return sorted(
        holdings, key=lambda holding: (-holding.bytes, holding.category, holding.name, holding.line)
    )


def _together(holdings: Iterable[Holding], name: Callable[[Holding], str]) -> Iterator[Holding]:
    """Those of a category that have one name, as one."""
    held: dict[tuple[str, str], list[Holding]] = {}
    for holding in holdings:
        held.setdefault((holding.category, name(holding)), []).append(holding)
    for (category, called), each in held.items():
        yield Holding(category, called, sum(h.bytes for h in each), sum(h.storages for h in each))
