"""The command line of a tool: `harness TOOL` and its arguments."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.record.fields import printable
from harness.record.places import as_path, one_run_at, runs_in

LONGEST = 300
"""The most characters of a word in a sentence: a path may be no longer than 4,096, and nobody reads that."""


class _Runs(argparse.Action):
    """Takes runs: one, or all that there are, a sweep's directory being its runs."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        """argparse's hook."""
        several = isinstance(values, Sequence)
        chosen = (
            [run for each in values for run in runs_in(each)] if several else values and one_run_at(values)
        )
        setattr(namespace, self.dest, chosen)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ValueError with a sentence, and accepts no abbreviated options."""

    def __init__(self, tool: str, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(f"harness {tool}", usage, description=description, epilog=epilog, allow_abbrev=False)
        self._tool = tool

    def takes_runs(self, nargs: str | None = None, more: str = "") -> None:
        """Add the positional argument RUN; `nargs` is argparse's. A sweep's directory is all its runs."""
        sweeps = "" if nargs in (None, "?") else ", or a sweep's directory for all its runs"
        help_text = f"its directory, or its record.json{sweeps}{more}"
        self.add_argument("run", nargs=nargs, action=_Runs, type=as_path, metavar="RUN", help=help_text)

    def takes_place(self, *names: str, default: Path | None = None, metavar: str, help: str) -> None:
        """Add an option whose value is a path."""
        self.add_argument(*names, type=as_path, default=default, metavar=metavar, help=help)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError for wrong arguments, instead of argparse's exit."""
        raise ValueError(f"{self._tool}: {printable(message)}; --help lists what there is")


def refuse(error: ValueError) -> int:
    """Say on stderr why a tool cannot do what it is asked; its exit code. Words that are long are cut."""
    sentence = re.sub(rf"(\S{{{LONGEST}}})\S+", r"\1...", printable(str(error)))
    print(f"harness: {sentence}", file=sys.stderr)
    return 2
