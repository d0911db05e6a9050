"""The command line of a tool: a word after `harness` and what follows it."""

import argparse
from pathlib import Path
from typing import NoReturn

from harness.record.schema import printable


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ValueError with a sentence, and takes no option by half its name."""

    def __init__(self, tool: str, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(f"harness {tool}", usage, description=description, epilog=epilog, allow_abbrev=False)
        self._tool = tool

    def takes_runs(self, nargs: str | None = None) -> None:
        """So many runs stand among the words, as argparse counts."""
        told = "its directory, or its record.json"
        self.add_argument("run", nargs=nargs, type=Path, metavar="RUN", help=told)

    def error(self, message: str) -> NoReturn:
        """What is wrong with the words."""
        raise ValueError(f"{self._tool}: {printable(message)}; --help says what there is")
