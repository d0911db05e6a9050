"""`train.optimizer_in_backward`: a weight is updated in backward as soon as its gradient is whole, and that is freed.

Backward then needs memory for about one gradient at a time. The hook is torch's, as in its tutorial "How to save memory
by fusing an optimizer step into the backward pass"; the run's one optimizer takes a step for one weight at a time, so
that its state is where it is otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from harness.config.settings import Settings
from harness.ledger import Ledger
from harness.runtime.world import World
from harness.training.nonfinite import Guard


class GuardInBackward(Guard):
    """Updates weights in backward, and stops before the first gradient that is not finite is used.

    A loss that is not finite changes no weight. Where a gradient is the first that is not finite, the weights behind it
    are updated already: FloatingPointError.
    """

    def __init__(
        self, settings: Settings, world: World, ledger: Ledger, deepspeed: Any, inner: torch.optim.Optimizer
    ) -> None:
        super().__init__(settings, world, ledger, deepspeed, inner)
        self._updated = False  # whether this step has changed a weight
        # DeepSpeed would make a gradient of zeros where there is none, to average it over ranks
        deepspeed.enable_backward_allreduce = False
        names = {id(parameter): name for name, parameter in deepspeed.module.named_parameters()}
        for group in inner.param_groups:
            for parameter in group["params"]:
                hook = partial(self._gradient_is_whole, names[id(parameter)], group)
                parameter.register_post_accumulate_grad_hook(hook)

    def watch_updates(self) -> None:
        """Nothing: DeepSpeed's own step finds no gradients, and changes no weight."""

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around DeepSpeed's own step, after the updates."""
        yield

    def seen(self, loss: torch.Tensor, value: float) -> torch.Tensor:
        """As in every run; a backward begins."""
        self._updated = False
        return super().seen(loss, value)

    def _gradient_is_whole(self, name: str, group: dict[str, Any], parameter: torch.nn.Parameter) -> None:
        if self._may_update(name, parameter):
            groups = self.inner.param_groups
            self.inner.param_groups = [{**group, "params": [parameter]}]
            try:
                with self.scalars():
                    self.inner.step()
            finally:
                self.inner.param_groups = groups
            self._updated = True
        parameter.grad = None

    def _may_update(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Whether no gradient of this step was found that is not finite."""
        if self.skipped:
            return False
        if not self.sums or self.sum_is_finite(parameter):
            return True
        if self._updated:
            raise FloatingPointError(
                f"the gradient of {name} is not finite, and with train.optimizer_in_backward=true other weights were "
                "updated before it was there; the last checkpoint is as it was"
            )
        self.skipped = True
        return False
