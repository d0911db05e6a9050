"""torchrun, which has started this process: its report of a failure, its end, and the directory that it lends."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

LATER = 2
"""Seconds after which torchrun has surely seen a process that has ended: it looks ten times a second."""


def report(sentence: str, of_another: bool = False) -> None:
    """Write `sentence` as this rank's error for torchrun's report. Without torchrun this does nothing.

    `of_another`: it is another rank that has failed. torchrun takes the rank with the earliest time for the cause, in
    whole seconds, and may see that rank's end after this one's.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra_info = {"timestamp": str(int(time.time()) + (LATER if of_another else 0))}
        contents = {"message": {"message": f"harness: {sentence}", "extraInfo": extra_info}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(contents))


def directory() -> Path | None:
    """The directory of all ranks that this torchrun has started; each has a folder in it, named by its local rank.

    None: there is no torchrun, or it has no such directory.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    folder = Path(file).parent
    return folder.parent if file and folder.is_dir() else None


def per_node() -> int | None:
    """The ranks that the launcher has started on each node.

    None: there is no launcher, it does not say, or nodes have different numbers of them.
    """
    size, local, nodes = (_number(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    if size == 1:
        return 1
    if size is None or local is None or size % local or nodes not in (None, size // local):
        return None
    return local


def _number(name: str) -> int | None:
    """The variable of this name, if it is a number above 0."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and 0 < len(text) < 8 and int(text) else None


def process() -> int | None:
    """The process id of torchrun, or of what stands between it and this rank. None: torchrun has not started it."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
