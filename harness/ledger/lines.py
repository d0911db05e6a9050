"""Which line of a program made something."""

import sys
from pathlib import Path

import torch

PASSED_OVER = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
"""How the files' names begin whose lines nobody asks for; `<` is code that was made and has no file."""


def calling_line() -> str:
    """`file:line` of the innermost caller that is neither torch's nor the ledger's; nothing where there is none."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PASSED_OVER):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
