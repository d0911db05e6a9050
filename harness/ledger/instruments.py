"""All that watches a loop beside the log, and how it goes out of a compiler's sight."""

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
    """What a program could come across: hooks on all modules and optimizers, and stand-ins for functions of torch's."""

    def __init__(self, log: Log, modules: Modules, roster: Roster, phases: Phases) -> None:
        self._log, self._modules, self._roster, self._phases = log, modules, roster, phases
        self._saving = Saving(log)
        self._in_sight, self._stays = ExitStack(), ExitStack()
        self._hiding = 0

    def open(self, *others: Callable[[], AbstractContextManager[None]]) -> None:
        """Begin to watch; `others` too, which a compiler may come across."""
        self._stays.enter_context(self._log)
        for each in (self._saving.watching, self._roster.watching_gradients, *others):
            self._stays.enter_context(each())
        self._show()

    def close(self) -> None:
        """Leave nothing behind."""
        self._in_sight.close()
        self._stays.close()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Within it the program is as it is without a ledger, but for hooks on gradients that name them."""
        self._hiding += 1
        with self._saving.aside() if self._hiding == 1 else ExitStack():
            if self._hiding == 1:
                self._in_sight.close()
                self._log.hide()
            try:
                yield
            finally:
                self._hiding -= 1
                if not self._hiding and self._log.recording:
                    self._log.show()
                    self._show()

    def _show(self) -> None:
        log = self._log
        for each in (
            self._modules.watching(),
            watching_steps(log, self._phases.stepped),
            self._saving.sharing(),
            self._saving.giving_back(),
            watching_checkpoints(log),
            watching_sizes(log),
            watching_threads(log),
            leaving_out_shapes(),
        ):
            self._in_sight.enter_context(each)
