"""Progress of a run and the time that it needs: a bar in a terminal, otherwise a line at intervals."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from harness.tables import duration, size

if TYPE_CHECKING:
    from harness.ledger import Ledger

Say = Callable[[str], None]

FIRST = 1.0
"""Seconds after the warm-up unit until the remaining time can be estimated."""
WORTH_PRINTING = 5.0
"""An estimate below this many seconds is not printed."""
EVERY = 30.0
"""The most seconds between two lines. A line is also printed after each tenth of the whole."""
MORE_EVERY = 0.2
"""The least seconds between two questions for what the bar also shows."""


class Pace:
    """Counts up to `total` of `unit`, from `done`, and prints once with `say` how long this will take.

    If `silent`, as on ranks other than 0 and in a rehearsal, it counts and prints nothing. If `total` is None, the
    total is unknown. `more` is asked now and then for what is shown too, as the peak so far.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        say: Say,
        silent: bool = False,
        done: int = 0,
        more: Callable[[], str] = str,
    ) -> None:
        self.total, self.unit, self.say, self.silent, self.more = total, unit, say, silent, more
        self.done, self.first_done = done, done
        self.started_at: float | None = None
        self.estimated = False
        self.last_line_at, self.tenth = 0.0, self._tenth()
        self.more_shown, self.more_asked_at = "", 0.0
        self.bar = tqdm(total=total, initial=done, unit=unit, leave=False, disable=silent or None)

    def __enter__(self) -> "Pace":
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def advance(self, count: int = 1, line: str = "") -> None:
        """`count` more units are done. `line` describes them."""
        now = time.monotonic()
        self.done += count if self.total is None else min(count, self.total - self.done)
        self._show(now, line)
        self.bar.update(self.done - self.bar.n)
        if self.silent or not self.done:
            return
        if self.started_at is None:
            self.started_at, self.first_done, self.last_line_at = now, self.done, now
            return
        remaining_seconds = 0.0
        if self.total is not None:
            remaining_seconds = (
                (now - self.started_at) / max(1, self.done - self.first_done) * (self.total - self.done)
            )
        if not self.estimated and now - self.started_at >= FIRST:
            self.estimated = True
            if remaining_seconds >= WORTH_PRINTING:
                self.say(f"{self.total:,} {self.unit}s: about {duration(remaining_seconds)}")
        self._print_line(now, line, remaining_seconds)

    def _show(self, now: float, line: str) -> None:
        """Set what stands after the bar, if a terminal shows it."""
        if self.bar.disable:
            return
        is_time = now - self.more_asked_at >= MORE_EVERY
        if is_time:
            self.more_shown, self.more_asked_at = self.more(), now
        self.bar.set_postfix_str("  ".join(filter(None, [line, self.more_shown])), refresh=is_time)

    def more_to_come(self, count: int) -> None:
        """`count` units more are to be done than was known."""
        assert self.total is not None
        self.total += count
        self.bar.total = self.total

    def up_to(self, done: int) -> None:
        """`done` units are done, including those that were not needed."""
        self.advance(max(0, done - self.done))

    def counting(self, act: Callable[..., Any], count: int) -> Callable[..., Any]:
        """`act`, followed by an advance of `count`."""

        def counted(*arguments: Any) -> Any:
            result = act(*arguments)
            self.advance(count)
            return result

        return counted

    def _tenth(self) -> int:
        return 10 * self.done // self.total if self.total else 0

    def _print_line(self, now: float, line: str, remaining_seconds: float) -> None:
        """Print a line if no terminal shows the bar."""
        tenth = self._tenth()
        if not self.bar.disable or not ((tenth > self.tenth and line) or now - self.last_line_at >= EVERY):
            return
        self.last_line_at, self.tenth = now, tenth
        remaining = f"about {duration(remaining_seconds)} left" if remaining_seconds >= WORTH_PRINTING else ""
        total = "" if self.total is None else f"/{self.total:,}"
        self.say("  ".join(filter(None, [f"{self.unit} {self.done:,}{total}", line, self.more(), remaining])))


def peak_of(ledger: "Ledger") -> str:
    """The peak so far as `ledger` knows it, as text; what it was, where that is decided. Empty: not measured."""
    peak, highest = ledger.last_peak, ledger.highest()
    if peak is None:
        return "" if highest is None else f"peak {size(highest)}"
    largest = sorted(((n, b) for n, b in peak.categories.items() if b), key=lambda pair: -pair[1])[:3]
    return f"peak {size(peak.bytes)} ({', '.join(f'{name} {size(nbytes)}' for name, nbytes in largest)})"


def aside(line: str) -> None:
    """Print `line` to stderr, outside the results."""
    tqdm.write(line, file=sys.stderr)
