"""A file is there completely, or as it was."""

from pathlib import Path

import pytest

from harness.runtime.files import put, whole


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    put(file, "first\n")
    put(file, "zweite \N{LATIN SMALL LETTER U WITH DIAERESIS}\n")
    assert file.read_text(encoding="utf-8") == "zweite \N{LATIN SMALL LETTER U WITH DIAERESIS}\n"
    assert [*tmp_path.iterdir()] == [file]


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    put(file, "first")
    with pytest.raises(KeyError), whole(file) as partial:  # noqa: PT012
        partial.write_text("half")
        raise KeyError("half")
    assert file.read_text() == "first"
    assert [*tmp_path.iterdir()] == [file]


def test_where_nobody_can_write_it_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        put(tmp_path / "absent" / "file.txt", "text")
