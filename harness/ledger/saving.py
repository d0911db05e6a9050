"""What autograd saves for backward, seen by hooks that change no value, and beside those of the program's own."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import graph
from torch.autograd.function import BackwardCFunction

from harness.ledger.log import Log
from harness.ledger.replaced import replaced
from harness.ledger.tensors import tensors_in, unnoticed

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]
"""What packs a tensor for autograd to keep, and what unpacks it."""

_stack: Any = torch._C._autograd
_function_modes: Any = torch._C._len_torch_function_stack

Packed = tuple[torch.Tensor, int, str]
"""A tensor as a ledger has autograd keep it, its version, and which output it is of the operator that saves it."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Whose attributes can be asked for without a word to code of the program's."""

_BACKWARD = re.compile(r"Backward\d*$")
"""What the name of a node has more than that of its operator."""

_asked = threading.local()
"""What was unpacked for a function in Python that asks now for what it saved."""

_KEPT = ("saved_tensors", "_tensors_no_vc_check")
"""A function's own in Python: what it saved, and what a compiled one keeps beside that."""

NOT_SAVED = (
    "what torch.func, or a program that disables saved-tensor hooks, keeps for backward is counted as activations, "
    "and not as saved"
)


class Saving:
    """Tells a log what autograd saves for backward.

    What an operator is given is saved as it is, for its data may be exchanged, as ZeRO-3 does. With hooks, an operator
    that saves its own result is not let go without a backward: the tensor has the node, and the node the tensor. So a
    result is saved as an alias without a node. Hooks that the program has are called as before, and what they keep is
    saved.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._hooks: Hooks | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it what is saved is seen."""
        if _stack._saved_tensors_hooks_get_disabled_error_message() is not None:
            self._log.unseen.note("saved", "saved", NOT_SAVED)
            yield
            return
        theirs = top()
        hooks = self._hooks = (
            (self._pack, unpack) if theirs is None else (self._telling(theirs[0]), theirs[1])
        )
        _push(hooks)
        try:
            yield
        finally:
            self._hooks = None
            _remove(hooks)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it nothing of this is there, for what takes no hooks at all."""
        hooks = self._hooks
        if hooks is None or top() != hooks:  # the program's own are on top, and count alone
            yield
            return
        _stack._pop_saved_tensors_default_hooks()
        try:
            yield
        finally:
            _push(hooks)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within it the program enters hooks of its own, or allows none, and both are as without a ledger."""
        enter, disable = graph.saved_tensors_hooks.__enter__, graph.disable_saved_tensors_hooks

        def entered(hooks: Any) -> None:
            if self._log.here() and not checkpoints((hooks.pack_hook, hooks.unpack_hook)):
                _push((self._telling(hooks.pack_hook), hooks.unpack_hook))
            else:
                enter(hooks)

        @contextmanager
        def disabled(message: str) -> Iterator[None]:
            if not self._log.here():
                with disable(message):
                    yield
                return
            self._log.unseen.note("saved", "saved", NOT_SAVED)
            with self.aside(), disable(message):
                yield

        with (
            replaced(graph.saved_tensors_hooks, "__enter__", entered),
            replaced(graph, "disable_saved_tensors_hooks", disabled),
        ):
            yield

    @contextmanager
    def giving_back(self) -> Iterator[None]:
        """Within it a function in Python is given what it saved itself, with all that was set on it."""
        saved: Any = BackwardCFunction.saved_tensors

        def saved_tensors(function: Any) -> Any:
            outer, _asked.unpacked = getattr(_asked, "unpacked", None), []
            try:
                given, packed = saved.__get__(function), _asked.unpacked
            finally:
                _asked.unpacked = outer
            if len(packed) != sum(each is not None for each in given):  # another's hooks packed them
                return given
            each_packed = iter(packed)
            return tuple(None if each is None else _itself(each, *next(each_packed)) for each in given)

        with replaced(BackwardCFunction, "saved_tensors", property(saved_tensors)):
            yield

    def _pack(self, tensor: torch.Tensor) -> Packed:
        if _function_modes() or type(tensor) not in _PLAIN:
            return unnoticed(self._packed)(tensor)
        return self._packed(tensor)

    def _packed(self, tensor: torch.Tensor) -> Packed:
        self._log.save(tensor)
        version = tensor._version
        node = None if tensor.is_leaf or self._log.traced() else tensor.grad_fn
        if node is None or not _saves_now(node):
            return tensor, version, ""
        made = f", which is output {tensor.output_nr} of {_BACKWARD.sub('', node.name())},"
        if type(tensor) is not torch.Tensor:
            return self._log.aside(tensor.detach), version, made
        with torch._C._DisableTorchDispatch():  # no mode of the program's has asked for this
            return tensor.detach(), version, made

    def _telling(self, theirs: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        """As `theirs`; what it gives autograd to keep is saved."""

        def pack(tensor: torch.Tensor) -> Any:
            packed = theirs(tensor)
            if self._log.here():
                self._log.save((packed,))
            return packed

        return pack


def unpack(packed: Packed) -> torch.Tensor:
    """What was packed, as it is. Raises RuntimeError if it has changed: with hooks autograd does not look."""
    tensor, version, _ = packed
    if type(tensor) in _PLAIN and not _function_modes():
        changed = tensor._version != version
    else:
        changed = unnoticed(getattr)(tensor, "_version") != version
    if changed:
        raise RuntimeError(unnoticed(_changed)(*packed))
    if (asked := getattr(_asked, "unpacked", None)) is not None:
        asked.append(packed)
    return tensor


def _itself(given: torch.Tensor, saved: torch.Tensor, version: int, made: str) -> torch.Tensor:
    """What was saved, of which autograd made `given`; that where an alias was saved."""
    return given if made else saved


def _changed(tensor: torch.Tensor, version: int, made: str) -> str:
    """What autograd says of a tensor that was saved at `version`, and has another now."""
    if not made and tensor.grad_fn is not None:
        made = f", which is output {tensor.output_nr} of {_BACKWARD.sub('', tensor.grad_fn.name())},"
    hint = (
        "the backtrace further above shows the operation that failed to compute its gradient. The variable in question "
        "was changed in there or anywhere later. Good luck!"
        if torch.is_anomaly_enabled()
        else "enable anomaly detection to find the operation that failed to compute its gradient, with "
        "torch.autograd.set_detect_anomaly(True, check_nan=False)."
    )
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {[*tensor.shape]}]{made} is at version {tensor._version}; expected version {version} "
        f"instead. Hint: {hint}"
    )


def _saves_now(node: Any) -> bool:
    """Whether `node` is being made, and saves its own result. A function's in Python may be, whatever came after it."""
    return isinstance(node, torch._C._FunctionBase) or node._sequence_nr() == number() - 1


def number() -> int:
    """That of the next node of autograd's in this thread."""
    return int(_stack._get_sequence_nr())


def saved_by(made: Iterable[torch.Tensor], since: int) -> Iterator[torch.Tensor]:
    """What autograd keeps for the backward of `made`, in the nodes whose numbers are `since` and more."""
    nodes: list[Any] = [tensor.grad_fn for tensor in made]
    known = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known or hasattr(node, "variable") or node._sequence_nr() < since:
            continue
        known.add(node)
        nodes += [each for each, _ in node.next_functions]
        for name in _KEPT if hasattr(node, "saved_tensors") else dir(node):
            if name in _KEPT or name.startswith("_saved_"):
                try:
                    yield from tensors_in((getattr(node, name, None),))
                except RuntimeError:  # it was changed in place, or is freed
                    continue


def checkpoints(hooks: Hooks) -> bool:
    """Whether these are of torch's checkpointing, which is watched by itself."""
    return getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__


def _remove(hooks: Hooks) -> None:
    """Take these away, and nobody else's that came after them."""
    above: list[Hooks] = []
    while (each := top()) is not None:
        _stack._pop_saved_tensors_default_hooks()
        if each == hooks:
            break
        above.append(each)
    for each in reversed(above):
        _push(each)


def top() -> Hooks | None:
    """The hooks that pack what autograd saves now."""
    hooks: Hooks | None = _stack._top_saved_tensors_default_hooks(True)
    return hooks


def _push(hooks: Hooks) -> None:
    _stack._push_saved_tensors_default_hooks(*hooks)
