"""All instruments that observe a program beside the log, and how they hide from a compiler."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from harness.ledger.elsewhere import watching_forks, watching_threads
from harness.ledger.log import Log
from harness.ledger.modules import Modules
from harness.ledger.observers import (
    leaving_out_shapes,
    watching_checkpoints,
    watching_recomputation,
    watching_sizes,
    watching_steps,
)
from harness.ledger.patch import DoesNotFit
from harness.ledger.phases import Phases
from harness.ledger.roster import Roster
from harness.ledger.saving import Saving
from harness.ledger.unseen import Figures

NOT_NAMED = "modules have no names, and phases are not detected"
NOT_COUNTED = "what autograd saves for backward is not counted, or not all of it"
NOT_RECOMPUTED = "what a backward recomputes counts as made by the backward"
NOT_RESIZED = "a storage that is resized without an operator keeps its first size"
NOT_ELSEWHERE = "work in threads that the program starts is in no figure, and the threads are not named"
NOT_SHAPES = "tensors that DTensor only learns a shape from are counted"
"""The consequences where an instrument is left out."""


class Instruments:
    """Hooks on all modules and optimizers, and stand-ins for torch functions: what the program could meet."""

    def __init__(self, log: Log, modules: Modules, roster: Roster, phases: Phases) -> None:
        self._log, self._modules, self._roster, self._phases = log, modules, roster, phases
        self._saving = Saving(log)
        self._visible, self._always_open = ExitStack(), ExitStack()
        self._hide_depth = 0

    def open(self, *others: Callable[[], AbstractContextManager[None]]) -> None:
        """Begin to observe, with `others` too, which stay visible to a compiler. Raises DoesNotFit for one of these."""
        self._always_open.enter_context(self._log)
        self._enter(self._always_open, "saved", NOT_COUNTED, self._saving.watching())
        for instrument in (self._roster.watching_gradients, *others):
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
        log, modules, saving, visible = self._log, self._modules, self._saving, self._visible
        for unpatched in (watching_steps(log, self._phases.stepped), watching_forks(log)):
            visible.enter_context(unpatched)
        self._enter(visible, "storages", NOT_NAMED, modules.watching())
        self._enter(visible, "saved", NOT_COUNTED, saving.sharing())
        self._enter(visible, "saved", NOT_COUNTED, watching_checkpoints(log))
        self._enter(visible, "storages", NOT_RECOMPUTED, watching_recomputation(log))
        self._enter(visible, "storages", NOT_RESIZED, watching_sizes(log))
        self._enter(visible, "all", NOT_ELSEWHERE, watching_threads(log))
        self._enter(visible, "storages", NOT_SHAPES, leaving_out_shapes())

    def _enter(
        self,
        stack: ExitStack,
        figures: Figures,
        consequence: str,
        instrument: AbstractContextManager[None],
    ) -> None:
        """Enter `instrument`. Where one of its patches does not fit, leave it out: a gap in `figures`."""
        try:
            stack.enter_context(instrument)
        except DoesNotFit as error:
            self._log.unseen.leave_out(error, figures, consequence)
