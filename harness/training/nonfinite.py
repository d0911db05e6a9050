"""Losses and gradients that are not finite: found before the update, which is left out, and traced to a module.

The check reads what is computed anyway: each loss, and the norm by which DeepSpeed clips gradients, which is that of
all ranks. Only where DeepSpeed computes no norm (`zero=0 precision=fp32 train.clip=0`) it sums them itself, in a
rehearsal too.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.config.settings import Settings
from harness.ledger import Ledger
from harness.ledger.patch import DEEPSPEED, Patch, install, table
from harness.runtime.world import World

PATCHES = table(
    Patch(
        "deepspeed.runtime.engine.DeepSpeedEngine",
        "clip_fp32_gradients",
        "without ZeRO, DeepSpeed clips fp32 gradients by a norm that it does not keep",
        DEEPSPEED,
        stays="as long as the engine lives",
    )
)

SCALARS = "converted to type float without overflow"
"""What torch says where an optimizer multiplies a tensor by a number that no fp32 can be."""


class Guard:
    """Leaves an update out, on all ranks alike, where a loss or the gradients are not finite.

    `deepspeed` is the engine, `inner` the optimizer that it steps. Does nothing with `train.nonfinite=ignore`.
    """

    def __init__(
        self, settings: Settings, world: World, ledger: Ledger, deepspeed: Any, inner: torch.optim.Optimizer
    ) -> None:
        self.world, self.ledger, self.deepspeed, self.inner = world, ledger, deepspeed, inner
        self.skipped = False  # whether the last update was left out
        self._norm: float | None = None
        self._groups: list[dict[str, Any]] | None = None
        self._without_norm = (
            settings.zero.stage == 0 and settings.dtype == "float32" and not settings.train.clip
        )
        wanted = settings.train.nonfinite != "ignore"
        self.on = wanted and not world.fake
        self.sums = wanted and self._without_norm
        if self.on or self.sums:
            self.watch_updates()

    def watch_updates(self) -> None:
        """Look at the gradients before each step of the optimizer."""
        if self.deepspeed.optimizer is self.inner and not self._without_norm:
            install(
                PATCHES["deepspeed.runtime.engine.DeepSpeedEngine.clip_fp32_gradients"].by(
                    self._clip, self.deepspeed
                )
            )
        self.inner.register_step_pre_hook(self._before_update)
        self.inner.register_step_post_hook(self._after_update)

    def seen(self, loss: Tensor, value: float) -> Tensor:
        """The `loss` of a micro-batch to begin its backward with. One that is not finite becomes NaN, and so do its
        gradients: their norm lets every rank know of it.
        """
        return loss if not self.on or math.isfinite(value) else loss * math.nan

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around the update of a step. Raises FloatingPointError where a scalar of the optimizer overflows."""
        self.skipped = self.on  # DeepSpeed leaves some updates out itself, and then calls no hook
        with self.scalars():
            yield

    @contextmanager
    def scalars(self) -> Iterator[None]:
        """Around a step of the optimizer. Raises FloatingPointError where a scalar of it overflows."""
        try:
            yield
        except RuntimeError as error:
            if not self.on or SCALARS not in str(error):
                raise
            group = self.deepspeed.optimizer.param_groups[0]
            over = (
                f" over 1 - {group['betas'][0]} (of betas) to the power of the step"
                if "betas" in group
                else ""
            )
            raise FloatingPointError(
                f"{type(self.inner).__name__}'s learning rate {group['lr']:g}{over} overflows fp32; "
                "lower train.learning_rate"
            ) from error

    def _before_update(self, inner: torch.optim.Optimizer, *_: object) -> None:
        """Take the parameters from the optimizer for one call, if it must not change them."""
        self.skipped = not self._gradients_are_finite(inner)
        if not self.skipped:
            return
        self._groups, inner.param_groups = inner.param_groups, []

    def _after_update(self, inner: torch.optim.Optimizer, *_: object) -> None:
        if self._groups is not None:
            inner.param_groups, self._groups = self._groups, None

    def _gradients_are_finite(self, inner: torch.optim.Optimizer) -> bool:
        if self._without_norm:
            return all(self.world.gather(self._sums_are_finite(inner)))
        norm = getattr(self.deepspeed.optimizer, "_global_grad_norm", self._norm)
        with self.ledger.uncounted():
            return norm is None or 0 <= float(norm) < math.inf

    def _sums_are_finite(self, inner: torch.optim.Optimizer) -> bool:
        """Whether this rank's gradients have a finite sum, one by one."""
        parameters = (parameter for group in inner.param_groups for parameter in group["params"])
        return False not in [
            self.sum_is_finite(parameter) for parameter in parameters
        ]  # of all, whatever is found

    def sum_is_finite(self, parameter: nn.Parameter) -> bool:
        """Whether its gradient, if any, has a finite sum. A rehearsal computes the sum too."""
        with self.ledger.uncounted():
            total = None if parameter.grad is None else parameter.grad.sum()
            return total is None or self.world.fake or math.isfinite(float(total))

    def _clip(self, original: Callable[[], None]) -> Callable[[], None]:
        """DeepSpeed's clipping without ZeRO, which keeps the norm."""
        from deepspeed.runtime.utils import clip_grad_norm_

        engine = self.deepspeed

        def clip_fp32_gradients() -> None:
            norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping(), mpu=engine.mpu)
            with self.ledger.uncounted():
                self._norm = float(norm)

        return clip_fp32_gradients


class Found(NamedTuple):
    """What is not finite in a micro-batch on a rank. The least of all ranks' is where it began."""

    order: tuple[int, int]
    phase: str
    sentence: str


class Watch:
    """Finds the first module whose output is not finite, and the first in backward whose output's gradient is not."""

    def __init__(self, root: nn.Module, stage: int = 0) -> None:
        self.root, self.stage = root, stage
        self._output = self._gradient = ""

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        """Look at every module's output inside this context, and at its gradient when a backward computes it."""
        hooks = [
            module.register_forward_hook(self._hook(name or type(module).__name__))
            for name, module in self.root.named_modules()
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def found(self, loss: float = 0.0) -> Found | None:
        """What is not finite, if anything is. `loss` is that of the micro-batch, where this rank has it."""
        if self._output:
            sentence = f"{self._output} is the first module whose output is not finite"
            return Found((0, self.stage), "forward", sentence)
        if not math.isfinite(loss):
            return Found((1, self.stage), "forward", "the output of every module is finite")
        if self._gradient:
            sentence = f"{self._gradient} is the first module in backward whose output has no finite gradient"
            return Found((2, -self.stage), "backward", sentence)
        return None

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(gradient: Tensor) -> None:
            if not self._gradient and not _finite(gradient):
                self._gradient = name

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _floating(output):
                if not self._output and not _finite(tensor):
                    self._output = name
                if tensor.requires_grad:
                    tensor.register_hook(look)

        return after


def origin(searched: Iterable[Found | None], loss: float, world: World) -> tuple[int, int, str, str]:
    """The rank and micro-batch in which a step with this mean `loss` ceased to be finite, the phase, and a sentence.

    `searched` has what this rank finds in each micro-batch. Collective.
    """
    problem = f"the loss is {loss}" if not math.isfinite(loss) else "the gradients are not finite"
    for micro_batch, own in enumerate(searched):
        every = [(found, rank) for rank, found in enumerate(world.gather(own)) if found is not None]
        if every:
            found, rank = min(every)
            return rank, micro_batch, found.phase, f"{problem}: {found.sentence}"
    return (
        0,
        0,
        "step",
        f"{problem}: no module's output or its gradient is the cause, but a weight's own gradient, or a sum of them",
    )


def _floating(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for each in output.values():
            yield from _floating(each)
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from _floating(each)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())
