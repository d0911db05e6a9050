"""The course of a run: which of its steps are computed, and whether their tensors have values."""

from collections.abc import Callable
from typing import Any

Backend = str | Callable[..., Any]
"""What compiles a graph: a name that `torch.compile` knows, or a function."""


class Course:
    """The course of a real run: every step, with values. A rehearsal has one of its own (`rehearsal/course.py`)."""

    values = True
    """Whether tensors have values, so that weights and texts are read, results written, and times measured."""

    compiler: Backend | None = "inductor"
    """What compiles the layers of training, where they are compiled. None: nothing, they run as they are written."""

    def steps(self, steps: range, recorded: int) -> range:
        """The `steps` of training, or batches of prompts, that are computed. The ledger records so many of them."""
        return steps


class Stopped(Exception):
    """A signal has ended the run before its last step, and its state is saved."""


WHOLE = Course()
"""The course of a real run."""
