"""The course of a run: which of its steps are computed, and whether their tensors have values."""


class Course:
    """The course of a real run: every step, with values. A rehearsal has one of its own (`rehearsal/course.py`)."""

    values = True
    """Whether tensors have values, so that weights and texts are read, results written, and times measured."""

    def steps(self, steps: range, recorded: int) -> range:
        """The `steps` of training, or batches of prompts, that are computed. The ledger records so many of them."""
        return steps


WHOLE = Course()
"""The course of a real run."""
