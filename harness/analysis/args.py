"""The command line of a tool: `harness TOOL` and its arguments."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from harness.record.fields import printable


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ValueError with a sentence, and accepts no abbreviated options."""

    def __init__(self, tool: str, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(f"harness {tool}", usage, description=description, epilog=epilog, allow_abbrev=False)
        self._tool = tool

    def takes_runs(self, nargs: str | None = None) -> None:
        """Add the positional argument RUN; `nargs` is argparse's."""
        help_text = "its directory, or its record.json"
        self.add_argument("run", nargs=nargs, type=Path, metavar="RUN", help=help_text)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError for wrong arguments, instead of argparse's exit."""
        raise ValueError(f"{self._tool}: {printable(message)}; --help lists what there is")


def refuse(error: ValueError) -> int:
    """Say on stderr why a tool cannot do what it is asked; its exit code."""
    print(f"harness: {printable(str(error))}", file=sys.stderr)
    return 2
