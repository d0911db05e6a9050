"""Infer the phases from a loop: a forward, its backward, the optimizer's step."""

from typing import Any

import torch

from harness.ledger.events import Where
from harness.ledger.log import Log
from harness.ledger.modules import in_backward
from harness.ledger.roster import Roster


class Phases:
    """Starts a new phase in the log when the loop does, unless the caller names its phases."""

    def __init__(self, log: Log, roster: Roster) -> None:
        self._log, self._roster = log, roster
        self.explicit = False  # the caller names the phases; none is inferred from the loop
        self._stepped = False

    def restart(self) -> None:
        """Begin again with the first step."""
        self._stepped = False

    def forward_begins(self, module: torch.nn.Module | None) -> None:
        """`module` is called from outside all other modules. None: a compiled function is called."""
        if module is not None:
            self._roster.find_model(module)
        if not self.explicit:
            where = self._log.where
            step = where.step + 1 if self._stepped else where.step
            first = self._stepped or where.phase == "idle"
            self._stepped = False
            self.enter(Where(step, "forward", 0 if first else where.micro_batch + 1))
        self._log.work.passed()

    def forward_ends(self) -> None:
        """The outermost module returns: ask the caches, which may have grown."""
        self._roster.walk_caches()

    def follow(self) -> None:
        """Before an operator: check whether backward has begun or ended."""
        if self.explicit:
            return
        where = self._log.where
        if in_backward():
            if where.phase == "forward":
                self.enter(where._replace(phase="backward"))
        elif where.phase == "backward":
            self._log.module = ""
            self.enter(Where(where.step, "step", where.micro_batch))

    def stepped(self, optimizer: torch.optim.Optimizer | None) -> None:
        """`optimizer` has finished a step. None: it is not known which optimizer."""
        self._stepped = True
        if optimizer is not None:
            self._roster.find_optimizer(optimizer)
        self._roster.walk()

    def program_begins(self, owner: Any) -> None:
        """A compiled program begins outside all modules: a method of `owner`, or a function if None."""
        if in_backward():
            return
        if isinstance(owner, torch.nn.Module):
            self.forward_begins(owner)
            return
        self.follow()
        if not isinstance(owner, torch.optim.Optimizer) and (
            self._log.where.phase == "idle" or self._stepped
        ):
            self.forward_begins(None)

    def enter(self, where: Where) -> None:
        """Let owners claim their storages, then enter phase `where`."""
        self._roster.walk()
        self._log.enter(where)
