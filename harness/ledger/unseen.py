"""What a ledger does not see of the program in its block: by name, each once, and never an error of the program's."""

import sys
import warnings
from dataclasses import dataclass
from typing import Literal

Figures = Literal["all", "storages", "saved", "allocator"]
"""Which are incomplete for it: all of them; those of storages, though not the allocator's; what is saved for backward;
or the allocator's own."""


class NotSeen(UserWarning):
    """A ledger's block did something that the ledger does not see, or sees only in part."""


@dataclass(frozen=True)
class Gap:
    """Something that is not seen, as a sentence that names it and says what to do."""

    figures: Figures
    sentence: str


class Unseen:
    """The gaps of one ledger, in the order in which it met them."""

    def __init__(self) -> None:
        self._gaps: dict[str, Gap] = {}
        self._said: set[str] = set()

    def note(self, name: str, figures: Figures, sentence: str) -> None:
        """`name` is not seen; the first sentence about it stays."""
        if name not in self._gaps:
            self._gaps[name] = Gap(figures, sentence)

    def gaps(self) -> list[Gap]:
        """All of them."""
        return list(self._gaps.values())

    def lacks(self, figures: Figures) -> bool:
        """Whether these figures are incomplete."""
        return any(gap.figures == figures for gap in self._gaps.values())

    def say(self) -> None:
        """Warn of each once. Where a program makes errors of warnings it is told on stderr: this is no error of its."""
        for name, gap in list(self._gaps.items()):
            if name not in self._said:
                self._said.add(name)
                try:
                    warnings.warn(gap.sentence, NotSeen, stacklevel=4)
                except NotSeen:
                    print(gap.sentence, file=sys.stderr)
