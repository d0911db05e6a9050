"""A run's figures by name, for trackers: `memory/peak/optimizer`. Bytes are bytes; None is not known."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from harness.record.memory import Rank
from harness.record.results import Results

if TYPE_CHECKING:
    from harness.ledger.recent import Stretch

Figures = dict[str, float | None]


def of_stretch(stretch: "Stretch") -> Figures:
    """The memory of a step. `peak` of a category is its own most, `at_peak` what it had when all had most."""
    return {
        "memory/peak": stretch.bytes,
        **_by_category("memory/peak", stretch.peaks),
        **_by_category("memory/at_peak", stretch.at_peak),
        **_by_category("memory/owned", stretch.owned),
    }


def of_run(ranks: Sequence[Rank], results: Results) -> Figures:
    """The figures of a whole run: the peak of its worst rank, and its speed."""
    worst = max(ranks, key=lambda rank: rank.peak.bytes or 0)
    performance, training = results.performance, results.training
    losses = training.losses if training is not None else []
    return {
        "memory/peak": worst.peak.bytes,
        "memory/unattributed": worst.allocator.unattributed,
        "memory/reserved": worst.peak.reserved,
        **_by_category("memory/peak", {name: each.peak for name, each in worst.categories.items()}),
        **_by_category("memory/at_peak", worst.peak.categories),
        "tokens_per_second": None if performance is None else performance.tokens_per_second,
        "loss": losses[-1] if losses else None,
    }


def _by_category(name: str, categories: Mapping[str, int | None]) -> Figures:
    return {f"{name}/{category}": nbytes for category, nbytes in categories.items()}
