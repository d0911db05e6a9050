"""However a rank's end goes wrong, it ends: with its failure, in one sentence, and never with another's code."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from harness.ledger import Where
from harness.runtime import failure
from harness.runtime.ending import Ending
from harness.runtime.failure import Failure

OWN = Failure(0, Where(3, "backward", 0), "ValueError: out of luck")


def ended(end: Callable[[], object], said: Path) -> tuple[int, list[str]]:
    """The exit code of a fork of this process in which `end` runs, and what is on its stderr."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            file = os.open(said, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 2)
            os.dup2(file, 1)
            sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)
            end()
        os._exit(99)  # it has come back
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text().splitlines()


def broken(*_: object) -> NoReturn:
    """Fail with an error that nobody expects."""
    raise LookupError("no such figure")


def ending(directory: Path) -> Ending:
    """The end of a rank that reports in `directory`."""
    end = Ending()
    end.directory, end.where = directory, lambda: OWN.where
    return end


def test_a_record_that_cannot_be_written_hides_no_failure(tmp_path: Path) -> None:
    end = ending(tmp_path)
    end.write = broken
    assert ended(lambda: end.fail(lambda: OWN), tmp_path / "said") == (3, [f"harness: {OWN.sentence()}"])
    assert failure.first_report(tmp_path) == failure.Report(0, OWN.sentence(), 3)


def test_where_the_search_for_the_failed_rank_fails_the_first_error_is_the_failure(tmp_path: Path) -> None:
    end = ending(tmp_path)
    code, said = ended(lambda: end.fail(broken, error=ValueError("out of luck")), tmp_path / "said")
    assert code == 3
    assert said[-1] == f"harness: {OWN.sentence()}"
    assert "LookupError: no such figure" in said  # our own bug is not hidden either


def test_what_a_tracker_does_at_the_end_does_not_change_it(tmp_path: Path) -> None:
    end = ending(tmp_path)
    end.leave = broken
    code, said = ended(lambda: end.fail(lambda: OWN), tmp_path / "said")
    assert (code, said[0]) == (3, f"harness: {OWN.sentence()}")


@pytest.mark.parametrize("place", ["removed", "file"])
def test_where_nothing_can_be_written_the_rank_still_says_why(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    end = ending(tmp_path / place)
    error = ValueError("out of luck")

    def fail() -> None:
        end.fail(lambda: failure.of(error, Where(3, "backward", 0), tmp_path / place, end.world), error=error)

    code, (said,) = ended(fail, tmp_path / "said")
    sentence, _, file = said.partition(" (traceback in ")
    assert (code, sentence) == (3, f"harness: {OWN.sentence()}")
    assert "ValueError: out of luck" in Path(file.removesuffix(")")).read_text()


def test_a_rank_without_any_report_has_not_been_refused(tmp_path: Path) -> None:
    code, said = ended(lambda: ending(tmp_path).fail(lambda: None), tmp_path / "said")
    assert (code, said) == (3, ["harness: the run ended, and no rank could say why"])


def test_the_other_ranks_end_with_the_first_report_and_do_not_repeat_it(tmp_path: Path) -> None:
    assert failure.claim(tmp_path, failure.Report(1, "its state is saved", 75))
    assert ended(lambda: ending(tmp_path).fail(lambda: OWN), tmp_path / "said") == (75, [])
