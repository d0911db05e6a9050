"""The course of a training run: the progress that is printed, and the figures of it in the record."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from harness.config.load import Settings
from harness.data.batch import Share
from harness.ledger import Ledger
from harness.record.figures import Figures, of_stretch
from harness.record.results import Performance, Training, Unsaved, Validation
from harness.runtime.course import Course
from harness.runtime.progress import Pace, peak_of
from harness.runtime.world import World

Say = Callable[[str], None]


class Progress:
    """The progress that is printed, and the record's figures of the course of training."""

    def __init__(
        self,
        settings: Settings,
        world: World,
        ledger: Ledger,
        first: int,
        say: Say,
        startup: float,
        course: Course,
    ) -> None:
        self.settings, self.world, self.ledger, self.say = settings, world, ledger, say
        self.values = course.values
        self.steps = course.steps(range(first, settings.train.steps), settings.ledger.steps)
        self.seconds: list[float] = []
        self.startup = startup
        train = settings.train
        self.positions = train.micro_batch * train.accumulation * train.sequence * world.dp_size
        self.tokens: list[int] = []
        self.labels = 0
        self.training = Training(first_step=first, losses=[], validation=[], skipped=[])

    @property
    def whole(self) -> bool:
        """Whether this run reaches `train.steps`."""
        return self.steps.stop == self.settings.train.steps

    def __iter__(self) -> Iterator[int]:
        """Yield the steps to run; rank 0 shows a progress bar."""
        silent = not (self.values and self.world.leads)
        peak = partial(peak_of, self.ledger)
        with Pace(self.steps.stop, "step", self.say, silent, self.steps.start, peak) as self.pace:
            for step in self.steps:
                self.began = time.perf_counter()
                yield step

    def stepped(self, loss: float, shares: Sequence[Share]) -> None:
        """Record the end of a step. `shares` are those of its micro-batches; empty where all positions count."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.seconds.append(time.perf_counter() - self.began)
        if not self.values:
            return
        self.training.losses.append(loss)
        counts = [round(sum(each) * self.world.dp_size) for each in zip(*shares, strict=True)]
        self.labels += counts[0] if counts else 0
        self.tokens.append(counts[1] if counts else self.positions)
        self.pace.advance(1, f"loss {loss:.3f}  {self.tokens[-1] / self.seconds[-1]:,.0f} tokens/s")

    def counted(self) -> Training:
        """The record so far, with the tokens of all steps where not all positions count."""
        if self.labels:
            tokens = sum(self.tokens)
            padding = len(self.tokens) * self.positions - tokens
            self.training = self.training.plus(
                tokens=tokens, label_tokens=self.labels, padding_tokens=padding
            )
        return self.training

    def skipped(self, step: int, loss: float) -> None:
        """Record that the update of `step` was left out, and say so."""
        self.training.skipped.append(step)
        problem = "its gradients are not finite" if math.isfinite(loss) else f"its loss is {loss}"
        number = len(self.training.skipped)
        self.say(f"step {step + 1}/{self.settings.train.steps}  {problem}: update skipped, {number} so far")

    def figures(self) -> Figures:
        """The last step's, for trackers."""
        return {
            "train/loss": self.training.losses[-1],
            "train/tokens_per_second": self.tokens[-1] / self.seconds[-1],
            "train/step_seconds": self.seconds[-1],
            **of_stretch(self.ledger.recent.take()),
        }

    def validated(self, step: int, loss: float) -> None:
        """Record the mean validation loss after `step`."""
        if not self.values:
            return
        self.training.validation.append(Validation(step=step + 1, loss=loss))
        self.say(f"step {step + 1}/{self.settings.train.steps}  validation loss {loss:.3f}")

    def unsaved(self, step: int, error: str) -> Training:
        """Say and record that the checkpoint after `step` could not be written. Returns the record so far."""
        self.say(f"step {step + 1}: no checkpoint, and the run goes on: {error}")
        unsaved = [*self.training.unsaved, Unsaved(step=step + 1, error=error)]
        self.training = self.training.plus(unsaved=unsaved)
        return self.training

    def rates(self) -> Performance:
        """Tokens per second over all ranks, by the median step. Steps under an exact ledger count only where there are
        no others.
        """
        ledger = self.settings.ledger
        exact_steps = ledger.steps if ledger.mode == "exact" else 1
        timed = self.seconds[exact_steps:] or self.seconds[1:] or self.seconds
        median, tokens = statistics.median(timed), statistics.mean(self.tokens[-len(timed) :])
        performance = Performance(
            startup_seconds=self.startup,
            tokens_per_second=tokens / median,
            step_seconds=median,
            steps_timed=len(timed),
        )
        if not self.training.padding_tokens:
            return performance
        return performance.plus(padded_tokens_per_second=self.positions / median)
