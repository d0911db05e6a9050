"""A search for the largest that fits, where more needs more."""

from collections.abc import Sequence
from dataclasses import dataclass, field

HIGHEST = 1024
"""Where a climb by doubling ends."""


@dataclass
class Climb:
    """Raises `key` under `words`: by `rungs` where they are given, else by doubling from 1, then between the last two.

    More of `key` needs more; so nothing above what does not fit is asked for.
    """

    words: tuple[str, ...]
    key: str
    rungs: Sequence[int] = ()
    fits: int = 0
    """The highest that fits."""
    fails: int | None = None
    """The lowest that does not."""
    exactly: bool = False
    over: bool = field(default=False, init=False)

    def wants(self) -> int | None:
        """The next one to try; None where there is nothing more to know."""
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
        """Whether what was wanted fits; `exactly`: whether it matters between powers of two."""
        asked = self.wants()
        assert asked is not None
        self.exactly = exactly
        if fits:
            self.fits = asked
        else:
            self.fails = asked

    def refused(self) -> None:
        """What was wanted cannot be: neither can more of it."""
        self.over = True
