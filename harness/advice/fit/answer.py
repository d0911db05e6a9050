"""What a search has found out, for the table, the data and the map."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from harness.advice.fit.combination import Combination, Trial, short
from harness.advice.fit.ranking import ranked
from harness.advice.fit.request import Request
from harness.device.replay import EXPANDABLE

NODE = 8
"""Devices on a node, in the command for several nodes."""


@dataclass(frozen=True)
class Answer:
    """What is known of the combinations of a request. `interrupted`: other trials were still to come."""

    request: Request
    combinations: Sequence[Combination]
    interrupted: bool = False

    @cached_property
    def trials(self) -> list[Trial]:
        """All trials, by combination and value."""
        return [
            trial
            for each in self.combinations
            for trial in sorted(each.trials, key=lambda trial: trial.value)
        ]

    @cached_property
    def fitting(self) -> list[Trial]:
        """The largest config that fits of each combination, the cheapest first."""
        return ranked(self.combinations, self.request.preference)

    @property
    def known(self) -> list[Trial]:
        """Those of which it is known whether they fit."""
        return [trial for trial in self.trials if trial.known]

    @property
    def closest(self) -> list[Trial]:
        """Those that do not fit, the closest first."""
        return sorted((trial for trial in self.known if not trial.fits), key=lambda trial: -trial.left)

    @property
    def rehearsed(self) -> list[Trial]:
        """Those that were rehearsed."""
        return [trial for trial in self.trials if trial.rehearsed]

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU's allocator was rehearsed too."""
        return any(trial.worst.reserved is not None for trial in self.rehearsed)

    @property
    def code(self) -> int:
        """The exit code: 0 something fits, 1 nothing fits, 3 nothing could be rehearsed, 130 interrupted."""
        if self.interrupted:
            return 130
        if self.fitting:
            return 0
        return 1 if self.known else 3

    def command(self) -> str | None:
        """The command line that runs the cheapest config that fits; None where none does."""
        return command(self.request, self.fitting[0]) if self.fitting else None


def command(request: Request, trial: Trial) -> str:
    """The command line that runs the config of `trial`."""
    if request.world <= NODE:
        start = f"torchrun --standalone --nproc-per-node {request.world}"
    else:
        nodes = f"--nnodes {-(-request.world // NODE)} --nproc-per-node {NODE}"
        start = f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    allocator = (
        [f"PYTORCH_ALLOC_CONF={shlex.quote(trial.settings.hardware.allocator)}"]
        if (trial.settings.hardware.allocator is not None)
        else []
    )
    overrides = [each for each in request.overrides if not each.startswith("hardware.allocator=")]
    prompts = [f"generation.count={trial.settings.generation.count}"] if request.mode == "infer" else []
    own = any(each.startswith("-") for each in request.overrides)  # a config with defaults of the user's own
    chosen = trial.overrides if own else short(trial.overrides)
    return " ".join([*allocator, start, "-m harness", *map(shlex.quote, overrides), *chosen, *prompts])


def would_fit_with(trial: Trial) -> list[str]:
    """The settings of the allocator with which a config would fit, the one that wastes least by design first."""
    changes = [each.change for each in trial.worst.alternatives if each.fits]
    return sorted(changes, key=lambda change: change != EXPANDABLE)
