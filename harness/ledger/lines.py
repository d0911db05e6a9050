"""The source line of a program that allocated something."""

import contextlib
import sys
from pathlib import Path
from types import FrameType

import torch

_HARNESS = Path(__file__).parents[1]
PASSED_OVER = (
    str(Path(torch.__file__).parent),
    *(str(_HARNESS / room) for room in ("ledger", "rehearsal", "device")),
    "<",
)
"""Prefixes of file names that are skipped. `<` marks generated code, which has no file."""


def calling_line() -> str:
    """`file:line` of the innermost caller outside torch and the ledger. Empty if there is none."""
    frame, _ = _caller(PASSED_OVER)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def calling_level() -> int:
    """The `stacklevel` with which a warning of this function's caller names the program's line."""
    return _caller((*PASSED_OVER, contextlib.__file__))[1]


def _caller(passed_over: tuple[str, ...]) -> tuple[FrameType | None, int]:
    """The innermost frame above the caller's that is not in these files, and how many frames above it lies."""
    frame: FrameType | None = sys._getframe(2)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(passed_over):
        frame, level = frame.f_back, level + 1
    return frame, level
