"""Which module is running: forwards by a stack, backwards by the node that made each module's output."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from harness.ledger.log import Log
from harness.ledger.tensors import tensors_in


def in_backward() -> bool:
    """Whether autograd is running a backward pass now, in this thread."""
    return torch._C._current_graph_task_id() != -1


class Modules:
    """Which module is running: forwards by a stack, backwards by the node that made each module's output."""

    def __init__(
        self, log: Log, entered: Callable[[torch.nn.Module], None], left: Callable[[], None]
    ) -> None:
        self.log = log
        self.names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._stack: list[tuple[str, bool]] = []
        self._entered, self._left = entered, left

    def name(self, module: torch.nn.Module, prefix: str = "") -> None:
        """Take the names of `module` and all within it."""
        for name, inner in module.named_modules(prefix=prefix):
            self.names.setdefault(inner, name or type(inner).__name__)

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = register_module_forward_pre_hook(self._before)
        after = register_module_forward_hook(self._after, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._stack.clear()

    def _before(self, module: torch.nn.Module, inputs: Any) -> None:
        log = self.log
        if not self._stack and not in_backward():
            self._entered(module)
        name = self.names.get(module) or type(module).__name__
        within = log.module
        if log.recomputing and not self._stack:  # a layer's forward is called again, and not the layer
            within = name.rpartition(".")[0]
        self._stack.append((within, log.recomputing))
        log.recomputing = in_backward()
        log.module = name

    def _after(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        log = self.log
        name = log.module
        if self._stack:
            log.module, log.recomputing = self._stack.pop()
        for tensor in _grad_outputs(output):
            tensor.grad_fn.register_prehook(_Enter(log, name))  # type: ignore[union-attr]
        if not self._stack and not in_backward():
            self._left()


def _grad_outputs(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.grad_fn is not None:
            yield output
    elif isinstance(output, (tuple, list, dict)):
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                yield tensor


class _Enter:
    """Called when backward reaches a module's output: from here on it is that module's backward."""

    __slots__ = ("log", "name")

    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def __call__(self, gradients: Any) -> None:
        self.log.module = self.name
