"""What a finding is, and a run with the figures that findings need. It imports no torch."""

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from harness.analysis.run_settings import settings_in
from harness.record.memory import Holding, Phase
from harness.record.schema import Record

if TYPE_CHECKING:
    from harness.config.settings import Settings

NOTABLE = 0.1
"""A part below this share of the whole gets no sentence."""

STEPS = ("data", "forward", "backward", "step", "validate", "prefill", "decode")
"""The phases inside a run's steps; other phases are outside them, such as setup."""


class Finding(NamedTuple):
    """A sentence about a run, its kind, and the bytes that it is about; None where it is about no bytes."""

    kind: str
    sentence: str
    bytes: int | None


class Run:
    """A record with the figures that the findings need."""

    def __init__(self, record: Record) -> None:
        self.record, self.worst = record, record.worst
        self.peak = record.worst.peak
        self.size = record.world.size

    @cached_property
    def settings(self) -> "Settings | None":
        """The run's config; None where this version cannot read it."""
        return settings_in(self.record)

    @property
    def stage(self) -> int | None:
        """The stage of ZeRO; None in inference, or where the config is unknown."""
        return self.settings.zero.stage if self.settings and self.record.mode == "train" else None

    @property
    def whole(self) -> int:
        """Total bytes at the peak; 0 where it was not measured."""
        return self.peak.bytes or 0

    def bytes_of(self, category: str) -> int:
        """Bytes of `category` at the peak."""
        return self.peak.categories.get(category) or 0

    def end(self, category: str) -> int:
        """Bytes of `category` at the end."""
        return (self.worst.categories[category].end or 0) if category in self.worst.categories else 0

    def highest(self, category: str) -> int:
        """Bytes of `category` at its own peak, or the most that a phase ended with."""
        return max(self.worst.highest.get(category) or 0, self.worst.seen.get(category) or 0)

    @property
    def holdings(self) -> list[Holding]:
        """The named holdings at the peak, the largest first."""
        return self.peak.holdings or []

    @property
    def buckets(self) -> list[int]:
        """Bytes of each bucket in which ZeRO reduces gradients, at the peak."""
        named = (each for each in self.holdings if each.name.startswith("ipg_bucket"))
        return [each.bytes for each in named if each.category == "communication"]

    def phase(self, step: int, name: str) -> Phase | None:
        """The first phase of that name in `step`."""
        return next((p for p in self.worst.phases if p.step == step and p.phase == name), None)

    def step_peak(self, step: int) -> int:
        """The most bytes in `step`; 0 where that was not measured."""
        return max((p.peak or 0 for p in self.worst.phases if p.step == step and p.phase in STEPS), default=0)
