"""The work of tokens that a rehearsal leaves out, from that of the tokens it does.

What a token of a decode takes is a polynomial in its number: with a cache of the first degree, for each finds one
position more; without one of the second, for attention is over all pairs. So its differences from token to token, and
theirs, say what any token takes, in whole numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from math import comb

from harness.ledger import Ledger, Where, Work

Turns = Iterator[tuple[int, int]]
"""Columns, and how many were left out before each."""

NOTHING = Work(0, 0, 0)


def filled_in(ledger: Ledger, turns: Turns) -> Turns:
    """`turns`, each of which is over when the next is asked for; in the end `ledger` is told what others would take."""
    before, seen = ledger.work(), list[tuple[int, Mapping[Where, Work]]]()
    number = left_out = 0
    for column, skipped in turns:
        left_out, number = left_out + skipped, number + skipped
        yield column, skipped
        after = ledger.work()
        seen.append(
            (number, {where: _less(work, before.get(where, NOTHING)) for where, work in after.items()})
        )
        before, number = after, number + 1
    if left_out:
        for where in before:
            done = {number: by.get(where, NOTHING) for number, by in seen}
            if any(any(work) for work in done.values()):
                ledger.fill_in(where, missing(done, number))


def missing(done: Mapping[int, Work], total: int) -> Work | None:
    """What those of `total` tokens take that are not among `done`, which has some by number from 0, four and more
    at each end.

    The very first and last may be like no other. None where the rest are not of one polynomial of the second degree.
    """
    left_out = [number for number in range(total) if number not in done]
    found = []
    for figures in zip(*done.values(), strict=True):
        known = dict(zip(done, figures, strict=True))
        slope = known[2] - known[1]
        bend = known[3] - known[2] - slope
        fitted = {n: known[1] + slope * (n - 1) + bend * comb(n - 1, 2) for n in range(1, total - 1)}
        if any(fitted.get(number, figure) != figure for number, figure in known.items()):
            return None
        found.append(sum(fitted[number] for number in left_out))
    return Work(*found)


class Alike:
    """Forwards that differ only in that each finds one position more: the first two and the last are made."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._taken: list[Work] = []  # by the first two
        self._left_out: list[Where] = []

    def make(self, act: Callable[[], object], number: int) -> None:
        """Do `act`, the forward of this number among those alike, from 0; then those left out before it are told."""
        where, before = self.ledger.where, self.ledger.work()
        act()
        took = _less(self.ledger.work().get(where, NOTHING), before.get(where, NOTHING))
        if self._left_out:
            self._fill_in(took, number)
        self._taken = [took] if number == 0 else [*self._taken, took]

    def leave_out(self) -> None:
        """One of those alike is not made."""
        self._left_out.append(self.ledger.where)

    def _fill_in(self, last: Work, number: int) -> None:
        """Those left out, where `last`, of this number, is of one line with the first two; else nobody knows."""
        known = len(self._taken) == 2 and number == 1 + len(self._left_out) + 1
        first, second = self._taken if known else (NOTHING, NOTHING)
        slope = _less(second, first)
        known = known and Work(*(a + b * number for a, b in zip(first, slope, strict=True))) == last
        for place, where in enumerate(self._left_out, start=2):
            work = Work(*(a + b * place for a, b in zip(first, slope, strict=True)))
            self.ledger.fill_in(where, work if known else None)
        self._left_out = []


def _less(work: Work, other: Work) -> Work:
    return Work(*(one - another for one, another in zip(work, other, strict=True)))
