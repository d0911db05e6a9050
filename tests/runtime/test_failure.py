"""Which rank is named where a peer is gone: the one that is, even where no process of its host is left to say so."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.ledger import Where
from harness.runtime import failure
from harness.runtime.world import World

HERE = socket.gethostname()
LOST = RuntimeError("[pair.cc:547] Connection closed by peer [10.0.0.2]:4242")
WHERE = Where(3, "backward", 0)


def world(*members: tuple[str, int]) -> World:
    """Rank 0 of a world of these hosts and process ids."""
    return World(0, len(members), 0, torch.device("cpu"), members)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "PATIENCE", 0.1)


def gone() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_one_rank_of_another_host_is_named_when_its_connection_closes(tmp_path: Path) -> None:
    actual = failure.of(LOST, WHERE, tmp_path, world((HERE, os.getpid()), ("node-b", 7)))
    assert actual is not None
    assert (actual.rank, actual.where) == (1, None)
    assert actual.sentence().startswith("rank 1 failed: it ended without an error message")
    assert "(node-b): RuntimeError: [pair.cc:547] Connection closed by peer" in actual.error


def test_of_several_ranks_on_other_hosts_none_is_accused(tmp_path: Path) -> None:
    members = (HERE, os.getpid()), ("node-b", 7), ("node-b", 8), ("node-c", 7)
    actual = failure.of(LOST, WHERE, tmp_path, world(*members))
    assert actual is not None
    assert actual.rank is None
    assert actual.sentence().startswith("a rank on another host failed: it ended without an error message")
    assert "(node-b, node-c)" in actual.error
    assert failure.claim(tmp_path, failure.Report(None, actual.sentence(), 3))


def test_a_rank_of_this_host_that_is_gone_is_named_before_any_other_host_s(tmp_path: Path) -> None:
    actual = failure.of(LOST, WHERE, tmp_path, world((HERE, os.getpid()), ("node-b", 7), (HERE, gone())))
    assert actual is not None
    assert actual.rank == 2


def test_a_rank_elsewhere_that_has_told_is_left_its_word(tmp_path: Path) -> None:
    assert failure.claim(tmp_path, failure.Report(1, "rank 1 failed: out of luck", 3))
    assert failure.of(LOST, WHERE, tmp_path, world((HERE, os.getpid()), ("node-b", 7))) is None


def test_the_first_word_about_the_end_is_everybody_s(tmp_path: Path) -> None:
    assert failure.first_report(tmp_path) is None
    first = failure.Report(1, "rank 1: model.path=mine: corrupt", 2)
    assert failure.claim(tmp_path, first)
    assert not failure.claim(tmp_path, failure.Report(0, "rank 0 failed", 3))
    assert failure.first_report(tmp_path) == first


def test_where_nothing_can_be_written_a_report_is_made_rather_than_lost(tmp_path: Path) -> None:
    report = failure.Report(0, "rank 0 failed", 3)
    (tmp_path / "file").touch()
    assert failure.claim(tmp_path / "removed", report)
    assert failure.claim(tmp_path / "file", report)
    assert failure.first_report(tmp_path / "removed") is None


def test_a_report_that_is_never_complete_is_of_a_run_that_failed(tmp_path: Path) -> None:
    (tmp_path / failure.CLAIM).write_text('{"rank": 0, "sente')
    actual = failure.first_report(tmp_path)
    assert actual is not None
    assert (actual.rank, actual.code) == (None, 3)
    assert failure.CLAIM in actual.sentence


def test_other_ranks_of_this_host_are_ended_and_those_elsewhere_are_not_known_to_be() -> None:
    waits = [sys.executable, "-c", "input()"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE) as other:
        assert failure.end_others(world((HERE, os.getpid()), (HERE, other.pid), (HERE, gone())))
    assert other.returncode == -signal.SIGTERM
    assert not failure.end_others(world((HERE, os.getpid()), ("node-b", 7)))


def test_an_error_of_its_own_is_this_rank_s(tmp_path: Path) -> None:
    actual = failure.of(ValueError("out of luck"), WHERE, tmp_path, world((HERE, os.getpid()), ("node-b", 7)))
    assert actual == failure.Failure(0, WHERE, "ValueError: out of luck")
