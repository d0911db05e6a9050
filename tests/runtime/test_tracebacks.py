"""The traceback of an unexpected error is in a file, and its sentence names the file."""

import re
import tempfile
from pathlib import Path

import pytest

from harness.runtime import tracebacks


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tracebacks, "_written", {})
    return tmp_path


def raised(message: str) -> Exception:
    """An error with a traceback, from one line."""
    try:
        raise KeyError(message)
    except KeyError as error:
        return error


def test_the_sentence_has_the_error_on_one_line_and_the_file(temporary: Path) -> None:
    said = tracebacks.sentence(raised("out\nof  luck"))
    named = re.fullmatch(r"KeyError: 'out\\nof luck' \(traceback in (.+)\)", said)
    assert named is not None, said
    assert [*temporary.iterdir()] == [Path(named[1])]
    text = Path(named[1]).read_text()
    assert text.startswith("Traceback (most recent call last)")
    assert "raise KeyError(message)" in text


def test_errors_of_one_line_share_a_file(temporary: Path) -> None:
    first, second = (tracebacks.leave(raised(each)) for each in ("first", "second"))
    assert first == second
    assert len([*temporary.iterdir()]) == 1
    assert tracebacks.leave(ValueError("another")) != first


def test_where_no_file_can_be_the_sentence_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/absent")
    assert tracebacks.sentence(raised("out of luck")) == "KeyError: 'out of luck'"
