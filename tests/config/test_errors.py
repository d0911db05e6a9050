"""The line of a library's error that a sentence of ours repeats, and which errors are mistakes of ours."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config import errors
from harness.config.errors import LONGEST, first_line, ours


@pytest.mark.parametrize(
    ("error", "line", "named"),
    [
        (ValueError("it is wrong\nand long"), "it is wrong", "ValueError: it is wrong"),
        (ValueError("\n  it is wrong"), "it is wrong", "ValueError: it is wrong"),
        (KeyError("key"), "KeyError: 'key'", "KeyError: 'key'"),
        (RuntimeError(), "RuntimeError", "RuntimeError"),
        (OSError("x " * LONGEST), ("x " * LONGEST)[:LONGEST], "OSError: " + ("x " * LONGEST)[:LONGEST]),
    ],
)
def test_it_is_the_first_with_the_class_where_it_is_no_sentence(
    error: Exception, line: str, named: str
) -> None:
    assert first_line(error) == line
    assert first_line(error, named=True) == named


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda: 1 + None, True),  # type: ignore[operator]
        (lambda: dict[str, int]()["absent"], True),
        (lambda: int("no number"), False),  # what an input may raise
        (lambda: Path("/absent").read_text(), False),
        (lambda: json.loads(None), False),  # type: ignore[arg-type]  # raised by another package
    ],
)
def test_a_mistake_is_ours_where_a_line_of_ours_raises_it(
    act: Callable[[], object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "PACKAGE", Path(__file__).parent)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - each has another
        act()
    assert ours(raised.value) is expected
    monkeypatch.setattr(errors, "PACKAGE", Path(errors.__file__).parents[1])
    assert not ours(raised.value)
