"""The source line of a program that allocated something."""

import sys
from pathlib import Path

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
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PASSED_OVER):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
