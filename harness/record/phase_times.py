"""What the phases of a run took, for its record."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Taken = Mapping[str, Mapping[int, float]]
"""Seconds by phase and step."""


def of_ranks(taken: Sequence[Taken], ledger: str) -> list[dict[str, Any]] | None:
    """The record's `performance.phases`: of each phase the median step, by the rank that is slowest in it.

    `taken` are the ranks', and `ledger` its mode: unless an exact one has slowed the first steps, the first is warm-up
    and counts only where it is alone. None where no step ran unslowed.
    """
    names = dict.fromkeys(name for each in taken for name in each)
    return [_slowest(name, taken, ledger) for name in names] or None


def _slowest(name: str, taken: Sequence[Taken], ledger: str) -> dict[str, Any]:
    found = []
    for rank, each in enumerate(taken):
        steps = list(each.get(name, {}).values())
        steps = steps if ledger == "exact" else steps[1:] or steps
        if steps:
            found.append((statistics.median(steps), -rank, len(steps)))
    seconds, rank, number = max(found)
    return {"phase": name, "seconds": seconds, "steps": number, "rank": -rank}
