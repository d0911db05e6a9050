"""The line of a library's error that a sentence of ours repeats."""

import pytest

from harness.config.errors import LONGEST, first_line


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
