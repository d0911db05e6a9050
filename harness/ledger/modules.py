"""Which module is running: in forward by a call stack, in backward by the node that computed each module's output."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules import module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from harness.ledger.log import Log
from harness.ledger.patch import patched
from harness.ledger.patch_table import PATCHES
from harness.ledger.tensors import tensors_in

_LEDGER_HOOKS: set[int] = set()
"""Ids of the global module hooks of ledgers."""


def original(model: torch.nn.Module) -> torch.nn.Module:
    """The module that `torch.compile` wraps, or `model` itself if it is not wrapped."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def in_backward() -> bool:
    """Whether autograd runs a backward pass now, in this thread."""
    return torch._C._current_graph_task_id() != -1


class Modules:
    """Tells the log which module is running, and calls back when the outermost module begins and ends."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self.on_enter: Callable[[torch.nn.Module], None] = lambda module: None
        self.on_exit: Callable[[], None] = lambda: None
        self._stack: list[tuple[str, bool]] = []
        self._mark_handles: list[RemovableHandle] = []  # hooks on the backward nodes of module outputs
        self._marking = True
        self._prune_above = 1024  # number of handles above which those of finished backwards are dropped

    @property
    def within(self) -> bool:
        """Whether a module is running."""
        return bool(self._stack)

    def name(self, model: torch.nn.Module, prefix: str = "") -> None:
        """Record the names of `model` and all modules in it."""
        for name, inner in model.named_modules(prefix=prefix):
            self.names.setdefault(inner, name or type(inner).__name__)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the running module inside this context."""
        before = register_module_forward_pre_hook(self._before)
        after = register_module_forward_hook(self._after, always_call=True)
        hook_ids = {before.id, after.id}
        _LEDGER_HOOKS.update(hook_ids)
        try:
            with patched(
                PATCHES["torch.nn.modules.module._has_any_global_hook"].by(lambda _: _has_other_hooks)
            ):
                yield
        finally:
            before.remove()
            after.remove()
            _LEDGER_HOOKS.difference_update(hook_ids)

    def mark(self, marking: bool) -> None:
        """Follow backwards too from now on. If False, remove all hooks from backward nodes."""
        self._marking = marking
        if not marking:
            for handle in self._mark_handles:
                handle.remove()
            self._mark_handles.clear()

    def _before(self, called_module: torch.nn.Module, inputs: Any) -> None:
        log = self.log
        if not log.here():
            return
        if not self._stack and not in_backward() and not log.traced():
            self.on_enter(called_module)
        name = self.names.get(called_module) or type(original(called_module)).__name__
        outer = log.module
        # checkpointing calls the layer's forward again, not the layer
        if log.recomputing and not self._stack:
            outer = name.rpartition(".")[0]
        self._stack.append((outer, log.recomputing))
        log.recomputing = in_backward()
        log.module = name

    def _after(self, called_module: torch.nn.Module, inputs: Any, output: Any) -> None:
        log = self.log
        if not log.here():
            return
        name = log.module
        if self._stack:
            log.module, log.recomputing = self._stack.pop()
        if self._marking:
            self._mark_handles += [node.register_prehook(Mark(log, name)) for node in _nodes(output)]
        if not self._stack and not in_backward():
            self.on_exit()
            if len(self._mark_handles) > self._prune_above:
                self._mark_handles = [
                    mark for mark in self._mark_handles if mark.hooks_dict_ref() is not None
                ]
                self._prune_above = 1024 + 2 * len(self._mark_handles)


def _nodes(output: Any) -> list[Any]:
    """The backward nodes of `output`, a tensor or nested tensors."""
    if isinstance(output, (torch.Tensor, tuple, list, dict)):
        with torch._C.DisableTorchFunction():
            return [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
    return []


def _has_other_hooks() -> bool:
    """Whether modules have global hooks besides those of ledgers, which a compiled module never sees."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return any(key not in _LEDGER_HOOKS for kind in kinds for key in getattr(module, f"_global_{kind}"))


class Mark:
    """Called when backward reaches a module's output: from there on it is that module's backward."""

    __slots__ = ("log", "name")

    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def __call__(self, gradients: Any) -> None:
        self.log.module = self.name
