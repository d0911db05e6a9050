"""A search for the largest value that fits, where a larger value never needs less memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field

HIGHEST = 1024
"""The value at which doubling ends."""


@dataclass
class Climb:
    """Raises the value of `key`, with the `overrides` fixed.

    It goes up `rungs` where there are some. Else it doubles from 1, then bisects between the last two values. A larger
    value never needs less memory, so nothing above a value that does not fit is tried.
    """

    overrides: tuple[str, ...]
    key: str
    rungs: Sequence[int] = ()
    fits: int = 0
    """The highest value that fits; 0 where none is known."""
    fails: int | None = None
    """The lowest value that does not fit."""
    exactly: bool = False
    over: bool = field(default=False, init=False)

    def wants(self) -> int | None:
        """The next value to try; None where the climb is over."""
        if self.over:
            return None
        if self.rungs:
            above = [rung for rung in self.rungs if rung > self.fits]
            return above[0] if above and self.fails is None else None
        if self.fails is None:
            return max(1, 2 * self.fits) if self.fits < HIGHEST else None
        between = (self.fits + self.fails) // 2
        return between if self.exactly and between > self.fits else None

    def learn(self, fits: bool, exactly: bool = False) -> None:
        """Record whether the wanted value fits. With `exactly`, values between powers of two are tried too."""
        rung = self.wants()
        assert rung is not None
        self.exactly = exactly
        if fits:
            self.fits = rung
        else:
            self.fails = rung

    def refused(self) -> None:
        """Record that the wanted value is refused: then larger ones would be refused too."""
        self.over = True
