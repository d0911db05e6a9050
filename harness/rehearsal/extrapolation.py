"""Compute the work of the tokens that a rehearsal leaves out, from the work of the tokens it runs.

The work of a decode token is a polynomial in its number: of degree 1 with a cache, as each token attends to one more
position; of degree 2 without one, as attention is over all pairs. So the first and second differences between tokens
give the work of any token, in whole numbers.
"""

from collections.abc import Callable, Mapping
from math import comb

from harness.generation.course import Turns
from harness.ledger import Ledger, Where, Work

NOTHING = Work()


def filled_in(ledger: Ledger, turns: Turns) -> Turns:
    """Yield `turns` and measure the work of each; a turn ends when the next one is requested. At the end, `ledger` gets
    the work of the tokens that were left out.
    """
    before, measured = ledger.work(), list[tuple[int, Mapping[Where, Work]]]()
    number = left_out = 0
    for column, skipped in turns:
        left_out, number = left_out + skipped, number + skipped
        yield column, skipped
        after = ledger.work()
        measured.append(
            (number, {where: _less(work, before.get(where, NOTHING)) for where, work in after.items()})
        )
        before, number = after, number + 1
    if left_out:
        for where in before:
            work_by_number = {number: work_by_place.get(where, NOTHING) for number, work_by_place in measured}
            if any(any(work) for work in work_by_number.values()):
                ledger.fill_in(where, missing(work_by_number, number))


def missing(done: Mapping[int, Work], total: int) -> Work | None:
    """The work of those of `total` tokens that are not in `done`. `done` has tokens by number from 0, four or more at
    each end.

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
    return Work(sums)


class Alike:
    """Forwards that differ only in one more position each: the first two and the last are run, the
    others are left out.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._taken: list[Work] = []  # work of the first two
        self._left_out: list[Where] = []

    def make(self, act: Callable[[], object], number: int) -> None:
        """Run `act`, forward `number` (from 0) of a run of similar ones; then give the ledger the work of those left
        out before it.
        """
        where, before = self.ledger.where, self.ledger.work()
        act()
        work = _less(self.ledger.work().get(where, NOTHING), before.get(where, NOTHING))
        if self._left_out:
            self._fill_in(work, number)
        self._taken = [work] if number == 0 else [*self._taken, work]

    def leave_out(self) -> None:
        """Leave out one of the similar forwards."""
        self._left_out.append(self.ledger.where)

    def _fill_in(self, last: Work, number: int) -> None:
        """Give the ledger the work of the forwards left out. It is unknown (None) unless `last`, the work of forward
        `number`, lies on one line with the first two.
        """
        known = len(self._taken) == 2 and number == 1 + len(self._left_out) + 1
        first, second = self._taken if known else (NOTHING, NOTHING)
        slope = _less(second, first)
        known = known and Work(a + b * number for a, b in zip(first, slope, strict=True)) == last
        for place, where in enumerate(self._left_out, start=2):
            work = Work(a + b * place for a, b in zip(first, slope, strict=True))
            self.ledger.fill_in(where, work if known else None)
        self._left_out = []


def _less(work: Work, other: Work) -> Work:
    return Work(one - another for one, another in zip(work, other, strict=True))
