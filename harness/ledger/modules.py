"""Which module is running: forwards by a stack, backwards by the node that made each module's output."""

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
from harness.ledger.replaced import replaced
from harness.ledger.tensors import tensors_in

_OURS: set[int] = set()
"""Numbers of the hooks that ledgers have on all modules."""


def original(model: torch.nn.Module) -> torch.nn.Module:
    """What `torch.compile` has wrapped; `model` itself where it has not."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def in_backward() -> bool:
    """Whether autograd is running a backward pass now, in this thread."""
    return torch._C._current_graph_task_id() != -1


class Modules:
    """Tells the log which module is running, and its caller where the outermost one begins and ends."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self.entered: Callable[[torch.nn.Module], None] = lambda module: None
        self.left: Callable[[], None] = lambda: None
        self._stack: list[tuple[str, bool]] = []
        self._marks: list[RemovableHandle] = []  # where backward comes to a module's output
        self._marking = True
        self._enough = 1024  # of them, before those are forgotten whose backward is over

    @property
    def within(self) -> bool:
        """Whether a module is running."""
        return bool(self._stack)

    def name(self, model: torch.nn.Module, prefix: str = "") -> None:
        """Take the names of `model` and all within it."""
        for name, inner in model.named_modules(prefix=prefix):
            self.names.setdefault(inner, name or type(inner).__name__)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it modules are followed."""
        before = register_module_forward_pre_hook(self._before)
        after = register_module_forward_hook(self._after, always_call=True)
        ours = {before.id, after.id}
        _OURS.update(ours)
        try:
            with replaced(module, "_has_any_global_hook", _others):
                yield
        finally:
            before.remove()
            after.remove()
            _OURS.difference_update(ours)

    def mark(self, marking: bool) -> None:
        """From here on follow backwards too, or (False) leave no hook on what autograd remembers."""
        self._marking = marking
        if not marking:
            for mark in self._marks:
                mark.remove()
            self._marks.clear()

    def _before(self, called: torch.nn.Module, inputs: Any) -> None:
        log = self.log
        if not log.here():
            return
        if not self._stack and not in_backward() and not log.traced():
            self.entered(called)
        name = self.names.get(called) or type(original(called)).__name__
        within = log.module
        if log.recomputing and not self._stack:  # a layer's forward is called again, and not the layer
            within = name.rpartition(".")[0]
        self._stack.append((within, log.recomputing))
        log.recomputing = in_backward()
        log.module = name

    def _after(self, called: torch.nn.Module, inputs: Any, output: Any) -> None:
        log = self.log
        if not log.here():
            return
        name = log.module
        if self._stack:
            log.module, log.recomputing = self._stack.pop()
        if self._marking:
            self._marks += [node.register_prehook(Mark(log, name)) for node in _nodes(output)]
        if not self._stack and not in_backward():
            self.left()
            if len(self._marks) > self._enough:
                self._marks = [mark for mark in self._marks if mark.hooks_dict_ref() is not None]
                self._enough = 1024 + 2 * len(self._marks)


def _nodes(output: Any) -> list[Any]:
    """Where backward comes to `output`, a tensor or some nested."""
    if isinstance(output, (torch.Tensor, tuple, list, dict)):
        with torch._C.DisableTorchFunction():
            return [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
    return []


def _others() -> bool:
    """Whether modules have global hooks besides those of ledgers, which a compiled one never sees."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return any(key not in _OURS for kind in kinds for key in getattr(module, f"_global_{kind}"))


class Mark:
    """Called when backward reaches a module's output: from here on it is that module's backward."""

    __slots__ = ("log", "name")

    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def __call__(self, gradients: Any) -> None:
        self.log.module = self.name
