"""Where runs are: a directory may be one run's, or contain those of a sweep. It imports nothing heavy."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

FILE = "record.json"
SWEEP = "multirun.yaml"
"""What Hydra leaves in the directory of a sweep."""

NUMBER = "hydra.job.num="
"""The override that says the number of a job, in its command."""

DEPTH = 4
"""How deep runs may lie below a directory: as multirun/DATE/TIME/N."""


def as_path(text: str | Path) -> Path:
    """`text` as a path. A leading ~ is the home directory, ~NAME that of a user; a file named so is ./~."""
    return Path(os.path.expanduser(text))


def runs_in(path: Path) -> list[Path]:
    """The runs at `path`: itself, or those in directories below it, a sweep's in the order of its jobs.

    Raises ValueError with a sentence for a directory without any.
    """
    try:
        if not path.is_dir() or (path / FILE).exists():
            return [path]
        runs = sorted(_below(path, DEPTH), key=_order)
    except OSError as error:  # a name that is too long, a directory that nobody may read
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not runs:
        raise ValueError(f"{path} contains no {FILE}, and no directory in it does")
    return runs


def one_run_at(path: Path) -> Path:
    """`path`, which must not contain several runs. Raises ValueError with a sentence."""
    runs = runs_in(path)
    if runs != [path]:
        count = f"{len(runs)} runs" if len(runs) > 1 else "a run"
        raise ValueError(f"{path} contains {count}; name one, as {runs[0]}")
    return path


def check_inside(directory: Path, file: Path) -> None:
    """Raise ValueError for a `file` of a run that leads out of its `directory`, or is none: a run writes neither."""
    if not file.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{file} leads out of the run's directory; a run's files lie in it")
    if not file.is_file():
        raise ValueError(f"{file} is no file")


def _below(directory: Path, depth: int) -> Iterator[Path]:
    """The directories with a record, but none within another run's."""
    if (directory / FILE).exists():
        yield directory
    elif depth:
        for each in directory.iterdir():
            if each.is_dir() and not each.is_symlink() and not each.name.startswith("."):
                yield from _below(each, depth - 1)


def _order(run: Path) -> list[tuple[int, str]]:
    """What runs are sorted by: a sweep's directory, then the number of the job; else the path, numbers as numbers."""
    sweep = next((each for each in run.parents if (each / SWEEP).exists()), None)
    number = None if sweep is None or (run.parent == sweep and run.name.isdecimal()) else _number(run)
    parts = run.parts if sweep is None or number is None else (*sweep.parts, str(number))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _number(run: Path) -> int | None:
    """The number of the job that made the run; None where its record does not say."""
    try:
        check_inside(run, run / FILE)
        words = json.loads((run / FILE).read_bytes())["environment"]["command"]
        return next(int(word.removeprefix(NUMBER)) for word in words if word.startswith(NUMBER))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
        return None
