"""Seconds of the phases of a run, for its record."""

import statistics
from collections.abc import Mapping, Sequence

from harness.record.results import Took

PhaseTimes = Mapping[str, Mapping[int, float]]
"""Seconds by phase and step."""


def of_ranks(times_by_rank: Sequence[PhaseTimes], ledger: str) -> list[Took] | None:
    """The record's `performance.phases`: for each phase the median step of the rank that is slowest in it.

    `times_by_rank` has one entry per rank; `ledger` is the mode of the ledger. An exact ledger slows the first steps,
    and these have no times. Otherwise the first step is warm-up and counts only if it is the only one. None if no step
    has times.
    """
    names = dict.fromkeys(name for times in times_by_rank for name in times)
    return [_slowest_rank(name, times_by_rank, ledger) for name in names] or None


def _slowest_rank(name: str, times_by_rank: Sequence[PhaseTimes], ledger: str) -> Took:
    candidates = []
    for rank, times in enumerate(times_by_rank):
        step_seconds = list(times.get(name, {}).values())
        step_seconds = step_seconds if ledger == "exact" else step_seconds[1:] or step_seconds
        if step_seconds:
            candidates.append((statistics.median(step_seconds), -rank, len(step_seconds)))
    seconds, rank, step_count = max(candidates)
    return Took(phase=name, seconds=seconds, steps=step_count, rank=-rank)
