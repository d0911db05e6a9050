"""What a library's error says, short enough for a sentence of ours; and which errors are mistakes of ours."""

import traceback
from pathlib import Path

LONGEST = 200

PACKAGE = Path(__file__).parents[1]

MISTAKES = (AssertionError, AttributeError, LookupError, NameError, TypeError, ZeroDivisionError)
"""Errors that code raises where it is wrong, and not where its input is."""


def first_line(error: BaseException, named: bool = False) -> str:
    """The first line of `error`; with its class where it is `named` so, where that line is one word, or empty."""
    line = next(iter(str(error).strip().splitlines()), "")[:LONGEST]
    name = type(error).__name__
    if not line:
        return name
    return f"{name}: {line}" if named or " " not in line else line


def one_line(error: BaseException, longest: int = 500) -> str:
    """The class of `error`, and at most so many characters of its message, on one line."""
    message = " ".join(str(error).split())[:longest]
    name = type(error).__name__
    return f"{name}: {message}" if message else name


def ours(error: BaseException) -> bool:
    """Whether `error` is a mistake of this package: a line of it raised an error that no wrong request should."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, MISTAKES) and bool(frames) and PACKAGE in Path(frames[-1].filename).parents
