"""A run's figures while it goes on, to TensorBoard, W&B or MLflow, through accelerate's own classes.

Everything is written into the run's directory, and nothing leaves the machine unless the tracker's own variables say so
(`WANDB_MODE`, `MLFLOW_TRACKING_URI`). A tracker that fails is dropped with one line, and the run goes on.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.errors import first_line
from harness.runtime.tracker_kinds import KINDS, Tracker

Say = Callable[[str], None]

PATIENCE = 10.0
"""The most seconds that a failed run waits for its trackers."""


class Trackers:
    """The trackers `names` of a run called `title`, whose hyperparameters are `settings`.

    Without names, as on ranks other than 0 and in a rehearsal, it does nothing.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        directory: Path = Path(),
        say: Say = print,
        title: str = "",
        settings: Mapping[str, bool | float | str] | None = None,
    ) -> None:
        self.names, self.directory, self.say = names, directory, say
        self.title, self.settings = title, settings or {}
        self._running: dict[str, Tracker] = {}
        self._step = 0

    def __bool__(self) -> bool:
        """Whether any tracker gets figures."""
        return bool(self._running)

    def start(self) -> None:
        """Begin a run in each tracker."""
        for kind in self.names:
            tracker = self._running[kind] = KINDS[kind]()
            if self._works(kind, tracker.start, self.title, self.directory, self.settings):
                self.say(f"tracker {kind}: {tracker.place}")

    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Send the `figures` of `step`, which is from 1. What is None is not known, and is left out."""
        self._step = step
        known = {name: float(figure) for name, figure in figures.items() if figure is not None}
        for kind, tracker in [*self._running.items()]:
            self._works(kind, tracker.log, known, step)

    def finish(self, figures: Mapping[str, float | None]) -> None:
        """Send the last `figures`, and end the run in each tracker."""
        self.log(self._step, {f"final/{name}": figure for name, figure in figures.items()})
        for kind, tracker in [*self._running.items()]:
            self._works(kind, tracker.finish)
        self._running.clear()

    def fail(self, sentence: str) -> None:
        """End the run in each tracker as failed, because of `sentence`. Any thread may call this."""
        running, self._running = self._running, {}  # the thread that logs may still run
        threads = [
            threading.Thread(target=self._works, args=(kind, tracker.fail, sentence, self._step), daemon=True)
            for kind, tracker in running.items()
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _works(self, kind: str, call: Callable[..., object], *arguments: Any) -> bool:
        """Call `call` of a tracker. Where that fails the tracker is dropped, a line says why, and this is false."""
        try:
            call(*arguments)
        except Exception as error:  # no result of the run may depend on it
            if self._running.pop(kind, None) is None:  # `fail` has ended it meanwhile
                return False
            self.say(f"tracker {kind} gets no more figures: {first_line(error, named=True)}")
            return False
        return True
