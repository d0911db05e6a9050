"""The record of what moved on a rank, from its ledger."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.ledger.categories import pattern
from harness.record.links import Nodes, as_text, by_ring, by_tree
from harness.record.memory import Cause, Transfer

if TYPE_CHECKING:
    from harness.ledger import Ledger, Where
    from harness.ledger.traffic import Amounts


Kind = tuple[str, tuple[int, ...]]
"""An operation and its ranks."""


def transfers(ledger: "Ledger", nodes: Nodes) -> list[Transfer] | None:
    """What moved on this rank, by phase, operation and group. None: nothing counted it."""
    if ledger.mode == "off" or any(gap.figures == "all" for gap in ledger.gaps):
        return None
    return [
        transfer
        for where, amounts in ledger.traffic.amounts().items()
        for transfer in _of(where, amounts, nodes)
    ]


def _of(where: "Where", amounts: "Amounts", nodes: Nodes) -> list[Transfer]:
    calls, nbytes = Counter[Kind](), Counter[Kind]()
    causes: dict[Kind, Counter[str] | None] = {}
    for moved, (number, payload) in amounts.items():
        kind = moved.operation, moved.ranks
        calls[kind] += number
        nbytes[kind] += payload
        by_name = causes.setdefault(kind, Counter())
        if moved.cause is None or by_name is None:
            causes[kind] = None
        else:
            by_name[pattern(moved.cause)] += payload
    return [
        Transfer(
            **where._asdict(),
            operation=operation,
            group=as_text(ranks),
            ranks=len(ranks),
            link=nodes.of(operation, ranks) if payload else None,
            calls=calls[operation, ranks],
            bytes=payload,
            by_ring=by_ring(operation, payload, len(ranks)),
            by_tree=by_tree(operation, payload, len(ranks)),
            causes=_causes(causes[operation, ranks]),
        )
        for (operation, ranks), payload in nbytes.items()
    ]


def _causes(by_name: Mapping[str, int] | None) -> list[Cause] | None:
    """The most bytes first."""
    if by_name is None:
        return None
    in_order = sorted(by_name.items(), key=lambda item: (-item[1], item[0]))
    return [Cause(name=name, bytes=nbytes) for name, nbytes in in_order]
