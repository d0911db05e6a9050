"""`record.json` of a run that goes on: its figures now and then, and the place where it is every second or so."""

import threading
import time
from pathlib import Path

from harness.record import record_file
from harness.record.schema import Failure, Record
from harness.runtime.files import put

EVERY = 1.0
"""The least seconds between two notes of the place."""

SHARE = 100
"""A note is also so many times rarer than it takes."""


class LiveRecord:
    """The record in `directory`. Two threads may write it: the run's, and the watcher's notes of the place."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._figures: str | None = None  # all of the record but its failure; None: no place is noted
        self._noted: Failure | None = None
        self._next = 0.0

    def begun(self, record: Record) -> None:
        """Take over `record`, which is written already."""
        self._figures, self._noted = record_file.without_failure(record), record.failure

    def write(self, record: Record, last: bool = False) -> None:
        """Write `record`; nothing is noted in it any more if it is the `last`. Raises OSError: what was written before
        then stays, and places are noted in it.
        """
        with self._lock:
            if last or record.failure is None:
                self._figures = None
                record_file.write(self.directory, record)
                return
            figures = record_file.without_failure(record)  # a record has megabytes: its text is made once
            self._put(figures, record.failure)
            self._figures, self._noted = figures, record.failure

    def note(self, failure: Failure) -> None:
        """Replace the record's failure by this one, if it is another and it is time. Raises OSError."""
        if failure == self._noted or time.monotonic() < self._next:
            return
        with self._lock:
            if self._figures is None:
                return
            start = time.monotonic()
            self._put(self._figures, failure)
            self._noted, now = failure, time.monotonic()
            self._next = now + max(EVERY, SHARE * (now - start))

    def _put(self, figures: str, failure: Failure) -> None:
        put(self.directory / record_file.FILE, record_file.with_failure(figures, failure))
