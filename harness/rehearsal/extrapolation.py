"""Compute the work and the traffic of the tokens that a rehearsal leaves out, from those of the tokens it runs.

Either is a polynomial in a decode token's number: of degree 1 with a cache, as each token attends to one more position;
of degree 2 without one, as attention is over all pairs. So the first and second differences between tokens give those
of any token, in whole numbers.
"""

from collections.abc import Callable, Mapping
from math import comb
from typing import NamedTuple

from harness.generation.course import Turns
from harness.ledger import Ledger, Where, Work
from harness.ledger.traffic import Moved

Figures = tuple[int, ...]
"""The numbers of a `Work`, or the calls and bytes of what moved."""


class Kind(NamedTuple):
    """What is counted in a phase: its work, or how much moved of one kind."""

    where: Where
    moved: Moved | None = None

    @property
    def nothing(self) -> Figures:
        """None of it."""
        return tuple(Work()) if self.moved is None else (0, 0)


Counts = Mapping[Kind, Figures]


def counts(ledger: Ledger) -> Counts:
    """What `ledger` has counted so far."""
    figures: dict[Kind, Figures] = {Kind(where): tuple(work) for where, work in ledger.work().items()}
    for where, amounts in ledger.traffic.amounts().items():
        figures.update({Kind(where, moved): amount for moved, amount in amounts.items()})
    return figures


def more(after: Counts, before: Counts) -> Counts:
    """What `after` has more than `before`."""
    return {kind: _less(figures, before.get(kind, kind.nothing)) for kind, figures in after.items()}


def fill_in(ledger: Ledger, kind: Kind, figures: Figures | None) -> None:
    """Give `ledger` the figures of what was left out. None: they are unknown."""
    where, moved = kind
    if moved is None:
        ledger.fill_in(where, None if figures is None else Work(figures))
    elif figures is None:
        ledger.traffic.unknown(
            f"how much of {moved.operation} the tokens of {where.phase} that are left out need"
        )
    else:
        ledger.traffic.fill_in(where, {moved: (figures[0], figures[1])})


def filled_in(ledger: Ledger, turns: Turns) -> Turns:
    """Yield `turns` and measure the work and the traffic of each; a turn ends when the next one is requested. At the
    end, `ledger` gets those of the tokens that were left out.
    """
    before, measured = counts(ledger), list[tuple[int, Counts]]()
    number = left_out = 0
    for column, skipped in turns:
        left_out, number = left_out + skipped, number + skipped
        yield column, skipped
        after = counts(ledger)
        measured.append((number, more(after, before)))
        before, number = after, number + 1
    if left_out:
        for kind in before:
            by_number = {token: counted.get(kind, kind.nothing) for token, counted in measured}
            if any(any(figures) for figures in by_number.values()):
                fill_in(ledger, kind, missing(by_number, number))


def missing(done: Mapping[int, Figures], total: int) -> Figures | None:
    """The figures of those of `total` tokens that are not in `done`. `done` has tokens by number from 0, four or more
    at each end.

    The very first and last token may differ from all others. None where the rest do not lie on one polynomial of degree
    2.
    """
    left_out = [number for number in range(total) if number not in done]
    sums = []
    for values in zip(*done.values(), strict=True):
        if not any(values):  # most: a class of operators that does not run
            sums.append(0)
            continue
        measured = dict(zip(done, values, strict=True))
        slope = measured[2] - measured[1]
        curvature = measured[3] - measured[2] - slope
        fitted = {n: measured[1] + slope * (n - 1) + curvature * comb(n - 1, 2) for n in range(1, total - 1)}
        if any(fitted.get(number, value) != value for number, value in measured.items()):
            return None
        sums.append(sum(fitted[number] for number in left_out))
    return tuple(sums)


class Alike:
    """Forwards that differ only in one more position each: the first two and the last are run, the
    others are left out.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._taken: list[Counts] = []  # of the first two, as if in `_ANYWHERE`
        self._left_out: list[Where] = []

    def make(self, act: Callable[[], object], number: int) -> None:
        """Run `act`, forward `number` (from 0) of a run of similar ones; then give the ledger what those left out
        before it have.
        """
        where, before = self.ledger.where, counts(self.ledger)
        act()
        done = {
            kind._replace(where=_ANYWHERE): figures
            for kind, figures in more(counts(self.ledger), before).items()
            if kind.where == where
        }
        if self._left_out:
            self._fill_in(done, number)
        self._taken = [done] if number == 0 else [*self._taken, done]

    def leave_out(self) -> None:
        """Leave out one of the similar forwards."""
        self._left_out.append(self.ledger.where)

    def _fill_in(self, last: Counts, number: int) -> None:
        """Give the ledger the figures of the forwards left out. They are unknown (None) unless those of `last`, forward
        `number`, lie on one line with the first two.
        """
        known = len(self._taken) == 2 and number == 1 + len(self._left_out) + 1
        first, second = self._taken if known else ({}, {})
        for kind in {**first, **last}:
            start, end = first.get(kind, kind.nothing), last.get(kind, kind.nothing)
            slope = _less(second.get(kind, kind.nothing), start)
            on_line = known and _on_line(start, slope, number) == end
            for place, where in enumerate(self._left_out, start=2):
                fill_in(
                    self.ledger,
                    kind._replace(where=where),
                    _on_line(start, slope, place) if on_line else None,
                )
        self._left_out = []


_ANYWHERE = Where(0, "", 0)


def _on_line(start: Figures, slope: Figures, number: int) -> Figures:
    return tuple(first + step * number for first, step in zip(start, slope, strict=True))


def _less(figures: Figures, other: Figures) -> Figures:
    return tuple(one - another for one, another in zip(figures, other, strict=True))
