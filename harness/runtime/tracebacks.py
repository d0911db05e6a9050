"""Where the traceback of an unexpected error goes: into a file, whose name is in the error's sentence."""

import os
import tempfile
import traceback
from contextlib import suppress

from harness.config.errors import one_line

_written: dict[tuple[object, ...], str] = {}
"""The files of this process, by the class of the error and the line that raised it."""


def sentence(error: BaseException, longest: int = 500) -> str:
    """The class and the message of `error` on one line, and the file that has its traceback."""
    file = leave(error)
    return one_line(error, longest) + (f" (traceback in {file})" if file else "")


def leave(error: BaseException) -> str:
    """Write the traceback of `error` to a file in the system's temporary directory. Returns its path, "" where there is
    none: nothing could be written.

    Errors of one class from one line have one file: a search may fail in the same way a hundred times.
    """
    frames = traceback.extract_tb(error.__traceback__)
    key = (type(error), *((frames[-1].filename, frames[-1].lineno) if frames else ()))
    if key not in _written:
        with suppress(OSError):
            number, name = tempfile.mkstemp(prefix="harness-traceback-", suffix=".txt")
            with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as stream:
                traceback.print_exception(error, file=stream)
            _written[key] = name
    return _written.get(key, "")
