"""Tensors from before a rehearsal: what is only read counts as the host's, and nothing of them is changed.

A module from before may be moved to the card: inside the rehearsal it then has fake parameters, and afterwards its own
again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from harness.ledger.lines import calling_line
from harness.ledger.patch import Use
from harness.ledger.tensors import tensors_in
from harness.rehearsal.fake_mode import Fakes
from harness.rehearsal.known_values import written
from harness.rehearsal.shims import APPLY
from harness.rehearsal.tensor_shims import apply_in_place
from harness.rehearsal.zero_shims import Original


class FromOutside(RuntimeError):
    """The program would change a tensor from before the rehearsal."""


class ProgramFakes(Fakes):
    """Fakes of a program that may have tensors from before the rehearsal."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch's own, after a refusal of what would change a real tensor. Raises FromOutside."""
        for tensor in tensors_in([*args, *(kwargs or {}).values()]):
            if not isinstance(tensor, FakeTensor):
                _check(func, tensor, args, kwargs or {})
        return super().dispatch(func, types, args, kwargs)


def _check(func: Any, tensor: torch.Tensor, args: Any, kwargs: Any) -> None:
    trained = tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()
    if trained:
        reason = "a backward would leave a fake gradient in it"
    elif func._schema.is_mutable and any(
        tensor is each for each in tensors_in([*written(func, args, kwargs)])
    ):
        reason = f"{func.__name__.partition('.')[0]} would change it"
    else:
        return
    raise FromOutside(
        f"{calling_line()}: a tensor of shape {tuple(tensor.shape)} is from before the rehearsal, and {reason}; make "
        "the model and its optimizer inside the rehearsal's with block, or move the model there with .to('cuda') first"
    )


def refuse_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step of an optimizer: raise FromOutside if it has parameters from before the rehearsal."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if any(not isinstance(tensor, FakeTensor) for tensor in tensors_in(parameters)):
        raise FromOutside(
            f"{calling_line()}: {type(optimizer).__name__} has parameters from before the rehearsal, and would step "
            "none that is rehearsed; make the optimizer inside the rehearsal's with block, when the model is there"
        )


class Outside:
    """The parameters and buffers of modules from before, which are put back at the end."""

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        self._fakes: dict[int, Any] = {}

    def __enter__(self) -> "Outside":
        return self

    def __exit__(self, *exc: object) -> None:
        for tensors, name, tensor in reversed(self._before):
            tensors[name] = tensor
        self._fakes.clear()

    def shim(self) -> Use:
        """`Module._apply`, which replaces real tensors of a module by fake ones, and moves these."""
        return APPLY.by(self._applying)

    def _applying(self, original: Original) -> Original:
        in_place, replace = apply_in_place(original), self._replace

        def stand_in(self: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
            for module in self.modules() if recurse else (self,):
                replace(module._parameters)
                replace(module._buffers)
            return in_place(self, fn, recurse)

        return stand_in

    def _replace(self, tensors: dict[str, Any]) -> None:
        """Replace real ones among a module's `tensors`."""
        for name, tensor in tensors.items():
            if tensor is not None and not isinstance(tensor, FakeTensor):
                self._before.append((tensors, name, tensor))
                tensors[name] = self._fake(tensor)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like `tensor`: the same one for a shared parameter."""
        if id(tensor) not in self._fakes:
            with torch.no_grad():
                fake = tensor.detach().clone()
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, tensor.requires_grad)
            self._fakes[id(tensor)] = fake
        known: torch.Tensor = self._fakes[id(tensor)]
        return known
