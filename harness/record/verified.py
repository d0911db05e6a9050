"""`harness.verified/1`: real runs on one machine beside their rehearsals, as `harness verify` leaves them.

A rehearsal for a card says what such a file says of it. It imports no torch.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from harness.record import record_file
from harness.record.fields import Difference, Part, Seconds, Text
from harness.record.schema import validated

SCHEMA = "harness.verified/1"
VARIABLE = "HARNESS_VERIFIED"
"""The environment variable with a directory of such files, instead of `DIRECTORY` in the current one."""
DIRECTORY = Path("profiles/verified")


class Figure(Part):
    """A figure of both runs, in bytes. One that is not `judged` differs by nature, and is only shown."""

    name: Text
    real: Difference | None
    rehearsed: Difference | None
    judged: bool = True

    @property
    def difference(self) -> int | None:
        """How much more the rehearsal says. None where one of them has no figure."""
        return None if self.real is None or self.rehearsed is None else self.rehearsed - self.real


class Pair(Part):
    """A real run and its rehearsal, their overrides, and the seconds of each, its start included."""

    name: Text
    config: list[Text]
    figures: list[Figure]
    real_seconds: Seconds
    rehearsed_seconds: Seconds
    mbu: float | None = None
    """The share of the bandwidth that the real decode uses. None: not measured."""
    unseen: list[Text] = Field(default_factory=list)
    """What the real run's ledger did not see."""

    @property
    def apart(self) -> list[Figure]:
        """The figures that should be equal, and are not: also those that only one of them has."""
        return [figure for figure in self.figures if figure.judged and figure.real != figure.rehearsed]


class Verified(Part):
    """What was compared on a machine: `hardware` is its page, `complete` whether all pairs are there."""

    hardware: Text
    device: Text
    device_name: Text
    driver: Text | None
    date: Text
    python: Text
    platform: Text
    packages: dict[Text, Text | None]
    complete: bool
    pairs: list[Pair]

    @property
    def within(self) -> int:
        """The largest difference of a figure that is judged, in bytes."""
        return max((abs(each.difference or 0) for pair in self.pairs for each in pair.apart), default=0)

    def sentence(self) -> str:
        """What a rehearsal for this hardware says of itself."""
        return (
            f"verified on {self.hardware}, within {self.within:,} bytes (torch {self.packages.get('torch')})"
        )


def text(verified: Verified) -> str:
    """The text of its file."""
    return json.dumps({"schema": SCHEMA, **verified.tree()}, indent=1) + "\n"


def read(file: Path) -> Verified:
    """What is in `file`. Raises ValueError with a sentence where it cannot be read."""
    tree = record_file.tree(file, SCHEMA, f"{file}: nothing was verified there; harness verify writes it")
    del tree["schema"]
    return validated(Verified, tree, str(file), "verification")


def of(hardware: str) -> Verified | None:
    """What was verified on a GPU of the page `hardware`, completely. None: nothing."""
    if Path(hardware).name != hardware:
        return None
    for directory in _directories():
        try:
            known = read(directory / f"{hardware}.json")
        except ValueError:
            continue
        if known.complete and known.device == "cuda" and known.hardware == hardware:
            return known
    return None


def _directories() -> Iterator[Path]:
    """Where such files are: the named or the usual directory; in the package, or beside it in a checkout."""
    yield Path(os.environ.get(VARIABLE) or DIRECTORY)
    package = Path(__file__).resolve().parents[1]
    yield from (package / "verified", package.parent / DIRECTORY)
