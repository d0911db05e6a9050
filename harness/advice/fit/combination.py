"""A combination of the axes' values, and what is known of it: by rehearsals, by a few layers, by shapes."""

from collections.abc import Sequence
from typing import NamedTuple

from harness.advice.fit.climb import Climb
from harness.config.settings import Settings
from harness.rehearsal import moments
from harness.rehearsal.moments import Moment
from harness.rehearsal.pool import Worst

NOT_EXPECTED = (float("inf"),)
"""The cost of what is not expected to fit: it comes after all others."""

PLAIN = (
    "zero.offload=none",
    "pipeline.stages=1",
    "checkpointing=none",
    "checkpointing.offload=none",
    "adapter=none",
)
"""Overrides that change nothing: they are off by default."""


class Trial(NamedTuple):
    """A config and what is known of it; `left` is the free memory in bytes, negative if it does not fit.

    A GPU's allocator that runs out of memory empties its cache and tries again, so there only the rehearsal within that
    memory decides.
    """

    value: int
    """Its value of the searched key."""
    overrides: tuple[str, ...]
    """One for each axis."""
    settings: Settings
    worst: Worst
    left: int

    @property
    def fits(self) -> bool:
        """Whether the config fits into the memory."""
        return self.rehearsed and self.left >= 0 and not self.worst.exhausted

    @property
    def fragmented(self) -> bool:
        """Whether only what is reserved does not fit, and what is allocated would."""
        allocated = self.worst.allocated
        return self.worst.exhausted and allocated is not None and allocated <= self.left + self.worst.needs

    @property
    def known(self) -> bool:
        """Whether it is known if the config fits: by a rehearsal, or because what a rank surely has does not."""
        return not self.worst.failure

    @property
    def rehearsed(self) -> bool:
        """Whether a rehearsal succeeded."""
        return self.known and not self.worst.bound


class Combination:
    """The `overrides` of all axes but the searched one, its trials, and the search of its largest value in `room`
    bytes. `values` are those that may be tried; where there are none, all are, with `exactly` also those between the
    powers of two.
    """

    def __init__(self, overrides: tuple[str, ...], values: Sequence[int], exactly: bool, room: int) -> None:
        self.overrides, self.room = overrides, room
        self.trials: list[Trial] = []
        self.few: tuple[Sequence[Moment], int] | None = None
        """The moments that a few layers let expect, and with which value; None where they do not."""
        self.hopeless = False
        """Whether it needs more than one that is expected not to fit."""
        self.expected_cost: tuple[float, ...] = NOT_EXPECTED
        """As `ranking.cost` of what is expected to be the largest that fits."""
        self.climb = Climb(values, exactly, self._likely)

    @property
    def largest(self) -> Trial | None:
        """The largest config that fits."""
        fitting = [trial for trial in self.trials if trial.fits]
        return max(fitting, key=lambda trial: trial.value, default=None)

    def expected(self, value: int) -> dict[str, int] | None:
        """The peak by category that is expected with `value`, from the nearest rehearsal, else from a few layers.

        Its sum is what has to fit, so on a GPU it has `slack`, in the proportion of the rehearsal. None: not known.
        """
        rehearsed = [trial for trial in self.trials if trial.rehearsed]
        if not rehearsed:
            return self.few and moments.estimate(*self.few, value)
        nearest = min(rehearsed, key=lambda trial: abs(trial.value - value))
        categories = moments.estimate(nearest.worst.moments, nearest.value, value)
        slack = nearest.worst.needs / max(1, nearest.worst.bytes) - 1
        return {**categories, "slack": int(slack * sum(categories.values()))}

    def expected_bytes(self, value: int) -> int | None:
        """The sum of what is `expected`. None: not known."""
        expected = self.expected(value)
        return None if expected is None else sum(expected.values())

    def _likely(self, value: int) -> bool | None:
        expected = self.expected_bytes(value)
        return None if expected is None else expected <= self.room

    def ruled_out(self, settings: Settings, value: int) -> Worst | None:
        """What `value` surely needs after the rehearsals of smaller ones, if that is too much."""
        return self.too_much(
            *(
                moments.at_least(trial.worst.moments, settings, trial.value, value)
                for trial in self.trials
                if trial.rehearsed and trial.value < value
            )
        )

    def too_much(self, *bounds: dict[str, int]) -> Worst | None:
        """The highest of `bounds`, by category, if there is no room for it."""
        most = max(bounds, key=lambda categories: sum(categories.values()), default={})
        needed = sum(most.values())
        return Worst(needed, 0, most, bound=True) if needed > self.room else None

    def add(self, trial: Trial) -> None:
        """Take over what a trial says."""
        if trial.known:
            self.climb.learn(trial.value, trial.fits)
        else:
            self.climb.end()
        self.trials.append(trial)


def short(overrides: Sequence[str]) -> list[str]:
    """`overrides` without those that change nothing."""
    return [override for override in overrides if override not in PLAIN]
