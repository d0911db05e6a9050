"""A search for the largest value that fits, where a larger value never needs less memory."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

HIGHEST = 1024
"""The value at which the search ends where no values are given."""

DOUBLING = tuple(2**power for power in range(HIGHEST.bit_length()))

TRUSTED = 2
"""How many times what is likely may be wrong before the search goes on without it."""


def _unknown(value: int) -> bool | None:
    return None


@dataclass
class Climb:
    """Searches the largest value that fits: of `rungs` where there are some, else of the powers of two, or with
    `exactly` of every whole number.

    It asks first for the largest value that is `likely` to fit, then for the next above, until one does not. Where
    nothing is known it goes up, doubling, and then halves what lies between. A larger value never needs less memory, so
    nothing above a value that does not fit is tried, and nothing below one that fits.
    """

    rungs: Sequence[int] = ()
    exactly: bool = False
    likely: Callable[[int], bool | None] = _unknown
    """Whether a value is likely to fit; None where nothing is known."""
    fits: int = 0
    """The highest value that fits; 0 where none is known."""
    fails: int | None = None
    """The lowest value that does not fit."""
    needless: int = 0
    """Values up to this one are not tried."""
    over: bool = field(default=False, init=False)
    wrong: int = field(default=0, init=False)
    """How often what was likely was wrong."""

    def wants(self) -> int | None:
        """The next value to try; None where the search is over."""
        values = self._open()
        if self.over or not values:
            return None
        if self.wrong >= TRUSTED or self.likely(values[0]) is None:
            return self._next(values)
        return self.highest() or values[0]

    def highest(self) -> int | None:
        """The highest value that is likely to fit, of those of which it is not known."""
        values = self._open()
        likely = bisect_left(
            values, True, key=lambda value: not self.likely(value)
        )  # a larger value is no likelier
        return values[likely - 1] if likely else None

    def _open(self) -> Sequence[int]:
        values = self.rungs or (range(1, HIGHEST + 1) if self.exactly else DOUBLING)
        above = max(self.fits, self.needless)
        return [value for value in values if above < value and (self.fails is None or value < self.fails)]

    def _next(self, values: Sequence[int]) -> int:
        """The next of the open `values` where nothing says what is likely."""
        if not self.exactly or self.rungs:
            return values[0]
        return values[len(values) // 2] if self.fails is not None else min(max(1, 2 * self.fits), values[-1])

    def learn(self, value: int, fits: bool) -> None:
        """Record whether `value` fits."""
        self.wrong += self.likely(value) is not fits
        if fits:
            self.fits = value
        else:
            self.fails = value

    def refuse(self, value: int) -> None:
        """Record that `value` is refused: then larger ones would be refused too."""
        self.fails = value

    def end(self) -> None:
        """Search no further: a rehearsal failed, and others would fail too."""
        self.over = True
