"""Live storages at one moment, grouped by name. Plain data in and out."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from harness.ledger.categories import CATEGORIES, KERNEL, pattern
from harness.ledger.events import Storage

LARGEST = 40
"""How many holdings of a peak are listed one by one."""


@dataclass(frozen=True)
class Holding:
    """Storages alive at the peak under one name: the owner's name, or the module and operator that allocated them.

    A parameter inside a buffer of several parameters has a holding of its own.
    """

    category: str
    name: str
    bytes: int
    storages: int
    line: str = ""
    """Source line that allocated them, if the log records lines."""


def holdings_of(storages: Iterable[Storage]) -> list[Holding]:
    """Group `storages`: the `LARGEST` names, then names merged over layers, then the rest of each category.

    The sum of all holdings is the sum of `storages`.
    """
    sizes_by_key: dict[tuple[str, str, str], list[int]] = {}
    for storage in storages:
        origin = f"{storage.module or storage.where.phase}: {storage.op.partition('.')[0]}"
        for name, nbytes in storage.shares:
            sizes_by_key.setdefault((storage.category, name or origin, storage.line), []).append(nbytes)
    holdings = _by_size(
        Holding(category, name, sum(sizes), len(sizes), line)
        for (category, name, line), sizes in sizes_by_key.items()
    )
    layers = _by_size(_merged(holdings[LARGEST:], lambda holding: pattern(holding.name)))
    rest = list(_merged(layers[LARGEST:], lambda holding: "others"))
    return [
        *holdings[:LARGEST],
        *layers[:LARGEST],
        *sorted(rest, key=lambda holding: (*CATEGORIES, KERNEL).index(holding.category)),
    ]


def _by_size(holdings: Iterable[Holding]) -> list[Holding]:
    return sorted(
        holdings, key=lambda holding: (-holding.bytes, holding.category, holding.name, holding.line)
    )


def _merged(holdings: Iterable[Holding], name: Callable[[Holding], str]) -> Iterator[Holding]:
    """Merge the holdings that have the same category and the same `name(holding)`."""
    groups: dict[tuple[str, str], list[Holding]] = {}
    for holding in holdings:
        groups.setdefault((holding.category, name(holding)), []).append(holding)
    for (category, group_name), group in groups.items():
        yield Holding(
            category,
            group_name,
            sum(member.bytes for member in group),
            sum(member.storages for member in group),
        )
