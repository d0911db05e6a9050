"""Signals and a launcher that is gone are noticed while the main thread waits, and by nobody else."""

import os
import signal
import sys
from queue import SimpleQueue

import pytest

from harness.runtime.watcher import watching


def test_a_signal_that_comes_before_there_is_something_to_call_waits_for_it() -> None:
    before, noticed = signal.getsignal(signal.SIGTERM), SimpleQueue[str]()
    with watching() as watcher:
        os.kill(os.getpid(), signal.SIGTERM)
        watcher.on_signal = noticed.put
        assert noticed.get(timeout=30) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_signal_to_a_fork_ends_the_fork_alone() -> None:
    noticed = SimpleQueue[str]()
    with watching() as watcher:
        watcher.on_signal = noticed.put
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert noticed.empty()


def test_a_plain_process_does_not_end_with_the_shell_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(os, "getppid", iter([7, *[1] * 9]).__next__)
    looks = SimpleQueue[None]()
    with watching() as watcher:
        watcher.on_launcher_gone = pytest.fail
        watcher.now_and_then = lambda: looks.put(None)
        looks.get(timeout=30)
        looks.get(timeout=30)
