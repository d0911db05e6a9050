"""How a rank ends if its run does not complete: at once, and with one report for all ranks."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from harness.ledger import Where
from harness.runtime import failure, launcher, world
from harness.runtime.failure import Failure, Report
from harness.runtime.world import World

FAILED, AGAIN = 3, 75
"""Exit codes of a run that failed, and of one that has saved its state and can go on: EX_TEMPFAIL of sysexits.h."""

NOWHERE = Path(os.devnull, "none")
"""A directory in which nothing can be written."""


class Ending:
    """The end of this rank. The run sets what it knows as it gets to know it."""

    def __init__(self) -> None:
        self.world: World = world.unmet()
        self.shared = launcher.directory() or NOWHERE
        self.directory = self.shared  # where the first report is claimed; later the run's own
        self.where: Callable[[], Where | None] = lambda: None
        self.write: Callable[[Failure], Sequence[str]] = lambda _: ()  # writes the record of a failure
        self.leave: Callable[[Report, bool], object] = lambda report, own: None  # the last that the run does
        self.saves = False  # the run saves its state when a signal asks it to end
        self.asked: str | None = None  # the signal that has asked it
        self._lock = threading.Lock()

    def on_signal(self, name: str) -> None:
        """A signal ends the run: at once, or after the step if the run saves its state then.

        But if another rank has failed, torchrun sends the signal, and the failure is that rank's.
        """
        if any(each.left for each in failure.of_this_host(self.world)):
            return  # torchrun ends this rank because others have refused the request, and it will refuse it too
        error = f"ended by {name}"
        if not self.saves:
            self.fail(partial(failure.outside, error, self.where(), self.directory, self.world))
        if failure.peer_failed(self.directory, self.world):
            self.fail(partial(failure.peer_lost, self.directory, self.world))
        self.asked = self.asked or name

    def on_launcher_gone(self) -> None:
        """torchrun is no more: nobody would end these ranks if one fails."""
        self.fail(partial(failure.outside, "the launcher is gone", self.where(), self.directory, self.world))

    def on_peer_gone(self) -> None:
        """Look for a rank of this host that has ended before all have met: no connection says so."""
        if not self.world.members and failure.gone(self.world):
            self.fail(partial(failure.peer_lost, self.directory, self.world))

    def before_directory(self, error: Exception) -> NoReturn:
        """End with `error`, or with the failure of the rank that caused it, before the run has a directory."""
        self.fail(partial(failure.early, error, self.directory, self.world), error=error)

    def fail(
        self,
        find: Callable[[], Failure | None],
        code: int = FAILED,
        error: BaseException | None = None,
    ) -> NoReturn:
        """End with the failure that `find` returns, unless another rank's report was first: then with that one.

        `find` may wait for other ranks. It runs in the first thread that fails; a second one waits here for the exit.
        If it fails itself, `error` is this rank's failure.
        """
        self._lock.acquire()
        try:
            rank_failure = self._found(find, error)
            if rank_failure is None:
                self.end(None)
            report = Report(rank_failure.rank, rank_failure.sentence(), code)
            if not failure.claim(self.directory, report):
                self.end(None)
            details: Sequence[str] = ()
            with suppress(Exception):  # nothing may hide the failure
                details = self.write(rank_failure)
            if rank_failure.hanging is not None:
                with suppress(OSError):
                    os.kill(rank_failure.hanging, signal.SIGKILL)
            self.end(report, details)
        finally:
            os._exit(code)

    def refuse(self, refusal: Exception) -> NoReturn:
        """End with a wrong request that this rank has noticed; most likely all have."""
        self._lock.acquire()
        try:
            if not self.world.leads:
                failure.await_report(self.directory)  # rank 0 most likely has the same refusal
            sentence = str(refusal) if self.world.leads else f"rank {self.world.rank}: {refusal}"
            report = Report(self.world.rank, sentence, 2)
            self.end(report if failure.claim(self.directory, report) else None)
        finally:
            os._exit(2)

    def _found(self, find: Callable[[], Failure | None], error: BaseException | None) -> Failure | None:
        try:
            return find()
        except Exception as own_error:
            traceback.print_exc()
            place = None
            with suppress(Exception):
                place = self.where()
            return Failure(self.world.rank, place, failure.error_line(error or own_error))

    def end(self, own: Report | None, details: Sequence[str] = ()) -> NoReturn:
        """Exit at once, with this rank's `own` report and `details`, or with the report of the rank that was first.

        The other ranks have ended or are ending: an orderly exit would wait for them.
        """
        report = own or failure.first_report(self.directory)
        if report is None:
            own = report = Report(self.world.rank, "the run ended, and no rank could say why", FAILED)
        try:
            if own:
                print(f"harness: {own.sentence}", *details, sep="\n", file=sys.stderr, flush=True)
            launcher.report(report.sentence, of_another=report.rank != self.world.rank)
            self.leave(report, own is not None)
            sys.stdout.flush()
        finally:
            os._exit(report.code)
