"""How far a run is, and how long it will take: a bar where there is a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from harness.tables import duration

Say = Callable[[str], None]

FIRST = 1.0
"""Seconds after the first of them, which is warm-up, from which on the rest can be foretold."""
WORTH = 5.0
"""Seconds that are worth foretelling."""
EVERY = 30.0
"""Seconds between lines, at most; and a tenth of the whole."""


class Pace:
    """Counts up to `total` of `unit`, from `done`; says with `say`, once, how long that will take.

    Where it is `silent`, as on other ranks than 0 and in a rehearsal, it counts and says nothing. Where `total` is None
    nobody knows how many there will be.
    """

    def __init__(self, total: int | None, unit: str, say: Say, silent: bool = False, done: int = 0) -> None:
        self.total, self.unit, self.say, self.silent = total, unit, say, silent
        self.done, self.began = done, done
        self.since: float | None = None
        self.foretold = False
        self.spoke, self.tenth = 0.0, self._tenth()
        self.bar = tqdm(total=total, initial=done, unit=unit, leave=False, disable=silent or None)

    def __enter__(self) -> "Pace":
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def advance(self, count: int = 1, line: str = "") -> None:
        """So many more are done; `line` is what a person should know of them."""
        now = time.monotonic()
        self.done += count if self.total is None else min(count, self.total - self.done)
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(self.done - self.bar.n)
        if self.silent:
            return
        if self.since is None:
            self.since, self.began, self.spoke = now, self.done, now
            return
        left = 0.0
        if self.total is not None:
            left = (now - self.since) / max(1, self.done - self.began) * (self.total - self.done)
        if not self.foretold and now - self.since >= FIRST:
            self.foretold = True
            if left >= WORTH:
                self.say(f"{self.total:,} {self.unit}s: about {duration(left)}")
        self._tell(now, line, left)

    def up_to(self, done: int) -> None:
        """As many are done: those that nobody needed count too."""
        self.advance(max(0, done - self.done))

    def counting(self, act: Callable[..., Any], count: int) -> Callable[..., Any]:
        """`act`, after each time of which so many more are done."""

        def counted(*given: Any) -> Any:
            made = act(*given)
            self.advance(count)
            return made

        return counted

    def _tenth(self) -> int:
        return 10 * self.done // self.total if self.total else 0

    def _tell(self, now: float, line: str, left: float) -> None:
        """A line, where no terminal shows a bar."""
        tenth = self._tenth()
        if not self.bar.disable or not ((tenth > self.tenth and line) or now - self.spoke >= EVERY):
            return
        self.spoke, self.tenth = now, tenth
        rest = f"about {duration(left)} left" if left >= WORTH else ""
        whole = "" if self.total is None else f"/{self.total:,}"
        self.say("  ".join(filter(None, [f"{self.unit} {self.done:,}{whole}", line, rest])))


def aside(line: str) -> None:
    """Say it to the person, and not among the results."""
    tqdm.write(line, file=sys.stderr)
