"""All instruments that observe a program beside the log, and how they hide from a compiler."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from harness.ledger.elsewhere import watching_threads
from harness.ledger.log import Log
from harness.ledger.modules import Modules
from harness.ledger.observers import (
    leaving_out_shapes,
    watching_checkpoints,
    watching_sizes,
    watching_steps,
)
from harness.ledger.phases import Phases
from harness.ledger.roster import Roster
from harness.ledger.saving import Saving


class Instruments:
    """Hooks on all modules and optimizers, and stand-ins for torch functions: what the program could meet."""

    def __init__(self, log: Log, modules: Modules, roster: Roster, phases: Phases) -> None:
        self._log, self._modules, self._roster, self._phases = log, modules, roster, phases
        self._saving = Saving(log)
        self._visible, self._always_open = ExitStack(), ExitStack()
        self._hide_depth = 0

    def open(self, *others: Callable[[], AbstractContextManager[None]]) -> None:
        """Begin to observe, with `others` too, which stay visible to a compiler."""
        self._always_open.enter_context(self._log)
        for instrument in (self._saving.watching, self._roster.watching_gradients, *others):
            self._always_open.enter_context(instrument())
        self._show()

    def close(self) -> None:
        """Remove all instruments."""
        self._visible.close()
        self._always_open.close()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside this context the program runs as without a ledger, except for the hooks that name gradients."""
        self._hide_depth += 1
        with self._saving.aside() if self._hide_depth == 1 else ExitStack():
            if self._hide_depth == 1:
                self._visible.close()
                self._log.hide()
            try:
                yield
            finally:
                self._hide_depth -= 1
                if not self._hide_depth and self._log.recording:
                    self._log.show()
                    self._show()

    def _show(self) -> None:
        log = self._log
        for instrument in (
            self._modules.watching(),
            watching_steps(log, self._phases.stepped),
            self._saving.sharing(),
            self._saving.returning_originals(),
            watching_checkpoints(log),
            watching_sizes(log),
            watching_threads(log),
            leaving_out_shapes(),
        ):
            self._visible.enter_context(instrument)
