"""What a ledger does not see of the program in its block: each gap once by name, and never an error in the program."""

import sys
import warnings
from dataclasses import dataclass
from typing import Literal

from harness.ledger.lines import calling_level
from harness.ledger.patch import DoesNotFit

Figures = Literal["all", "storages", "saved", "allocator", "kernel", "traffic"]
"""The figures that a gap makes incomplete: all; those of storages but not the allocator's; the bytes saved for
backward; the allocator's own; what kernels take; or what moves."""


class NotSeen(UserWarning):
    """A ledger's block did something that the ledger does not see, or sees only in part."""


@dataclass(frozen=True)
class Gap:
    """Something that is not seen, with a sentence that names it and says what to do."""

    figures: Figures
    sentence: str


class Unseen:
    """The gaps of one ledger, in the order of their first occurrence."""

    def __init__(self) -> None:
        self._gaps: dict[str, Gap] = {}
        self._warned: set[str] = set()

    def note(self, name: str, figures: Figures, sentence: str) -> None:
        """Record that `name` is not seen. Its first sentence stays."""
        if name not in self._gaps:
            self._gaps[name] = Gap(figures, sentence)

    def renew(self, name: str, figures: Figures, sentence: str) -> None:
        """Record that `name` is not seen, in place of an earlier sentence."""
        self._gaps[name] = Gap(figures, sentence)

    def leave_out(self, error: DoesNotFit, figures: Figures, consequence: str) -> None:
        """Record that an instrument is left out, as one of its patches does not fit the installed package."""
        self.note(error.patch, figures, f"{error}: {consequence}")

    def gaps(self) -> list[Gap]:
        """All gaps."""
        return list(self._gaps.values())

    def lacks(self, figures: Figures) -> bool:
        """Whether these figures are incomplete."""
        return any(gap.figures == figures for gap in self._gaps.values())

    def say(self) -> None:
        """Warn of each gap once.

        If the program turns warnings into errors, print to stderr instead: a gap is not an error of the program.
        """
        for name, gap in list(self._gaps.items()):
            if name not in self._warned:
                self._warned.add(name)
                try:
                    warnings.warn(gap.sentence, NotSeen, stacklevel=calling_level())
                except NotSeen:
                    print(gap.sentence, file=sys.stderr)
