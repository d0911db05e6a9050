"""Files that are there completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.runtime import faults


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` to write to; at the end it replaces `file`, on disk. An error leaves `file` as it was.

    Raises OSError.
    """
    faults.at(f"write {file.name}")
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def put(file: Path, text: str) -> None:
    """Write `text` to `file`, completely or not at all. Raises OSError."""
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")
