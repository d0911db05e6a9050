"""Phases that are read off a loop: a forward, its backward, the optimizer's step."""

from typing import Any

import torch

from harness.ledger.events import Where
from harness.ledger.log import Log
from harness.ledger.modules import in_backward
from harness.ledger.roster import Roster


class Phases:
    """Turns the log's page where a loop does, unless somebody names its phases."""

    def __init__(self, log: Log, roster: Roster) -> None:
        self._log, self._roster = log, roster
        self.told = False  # somebody names the phases; nothing is read off the loop
        self._stepped = False

    def restart(self) -> None:
        """Begin with the first step."""
        self._stepped = False

    def forward_begins(self, module: torch.nn.Module | None) -> None:
        """`module` is called, from outside of all others; None: a function that a compiler made a program of."""
        if module is not None:
            self._roster.find_model(module)
        if not self.told:
            where = self._log.where
            step = where.step + 1 if self._stepped else where.step
            first = self._stepped or where.phase == "idle"
            self._stepped = False
            self.turn(Where(step, "forward", 0 if first else where.micro_batch + 1))
        self._log.work.passed()

    def forward_ends(self) -> None:
        """It returns."""
        self._roster.walk_caches()

    def follow(self) -> None:
        """Before an operator: has backward begun, or ended?"""
        if self.told:
            return
        where = self._log.where
        if in_backward():
            if where.phase == "forward":
                self.turn(where._replace(phase="backward"))
        elif where.phase == "backward":
            self._log.module = ""
            self.turn(Where(where.step, "step", where.micro_batch))

    def stepped(self, optimizer: torch.optim.Optimizer | None) -> None:
        """`optimizer` has made a step; None: it is not known which."""
        self._stepped = True
        if optimizer is not None:
            self._roster.find_optimizer(optimizer)
        self._roster.walk()

    def program_begins(self, owner: Any) -> None:
        """Something compiled begins, outside of all modules: `owner`'s method, or nobody's."""
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

    def turn(self, where: Where) -> None:
        """From here on it is `where`."""
        self._roster.walk()
        self._log.enter(where)
