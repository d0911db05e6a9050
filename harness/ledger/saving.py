"""What autograd saves for backward, seen by hooks that change no value and coexist with the program's own hooks."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from harness.ledger.log import Log
from harness.ledger.patch import patched
from harness.ledger.patch_table import PATCHES
from harness.ledger.tensors import PLAIN_TYPES, tensors_in, without_torch_function

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]
"""The function that packs a tensor for autograd to keep, and the function that unpacks it."""

_stack: Any = torch._C._autograd
_function_modes: Any = torch._C._len_torch_function_stack
_next_number: Any = _stack._get_sequence_nr

Packed = tuple[torch.Tensor, int, str]
"""A tensor as the ledger stores it in autograd, its version, and which output of the saving operator it is."""

_NODE_SUFFIX = re.compile(r"Backward\d*$")
"""The suffix of a node's name after the name of its operator."""


class _Reading(threading.local):
    unpacked: "list[Packed] | None" = None


_reading = _Reading()
"""What was unpacked for a Python autograd function that reads its saved tensors now."""

_SAVED_ATTRIBUTES = ("saved_tensors", "_tensors_no_vc_check")
"""Attributes of a Python autograd function: its saved tensors, and what a compiled function keeps besides."""

NOT_SAVED = (
    "what torch.func, or a program that disables saved-tensor hooks, keeps for backward is counted as activations, "
    "and not as saved"
)


class Saving:
    """Reports to the log what autograd saves for backward.

    An operator's argument is saved as it is, because its data may be exchanged, as in ZeRO-3. With hooks, an operator
    that saves its own result would never be freed without a backward: the tensor refers to the node, and the node to
    the tensor. So a result is saved as an alias without a node. The program's own hooks are called as before, and what
    they return is saved.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._hooks: Hooks | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See what is saved inside this context. Raises DoesNotFit where the hooks would change the program."""
        with self.sharing():
            pass
        if _stack._saved_tensors_hooks_get_disabled_error_message() is not None:
            self._log.unseen.note("saved", "saved", NOT_SAVED)
            yield
            return
        program_hooks = top_hooks()
        hooks = self._hooks = (
            (self._pack, unpack)
            if program_hooks is None
            else (self._reporting(program_hooks[0]), program_hooks[1])
        )
        _push(hooks)
        try:
            yield
        finally:
            self._hooks = None
            _remove(hooks)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Remove these hooks inside this context, for code that accepts no hooks at all."""
        hooks = self._hooks
        # where the program's own hooks are on top, only they are called
        if hooks is None or top_hooks() != hooks:
            yield
            return
        _stack._pop_saved_tensors_default_hooks()
        try:
            yield
        finally:
            _push(hooks)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside this context the program can enter hooks of its own, or forbid hooks, as without a ledger.

        And a Python autograd function reads the tensors that it saved, with their attributes. Raises DoesNotFit.
        """
        with patched(
            PATCHES["torch.autograd.graph.saved_tensors_hooks.__enter__"].by(self._entering),
            PATCHES["torch.autograd.graph.disable_saved_tensors_hooks"].by(self._disabling),
            PATCHES["torch.autograd.function.BackwardCFunction.saved_tensors"].by(_reading_originals),
        ):
            yield

    def _entering(self, enter: Callable[[Any], None]) -> Callable[[Any], None]:
        log, reporting = self._log, self._reporting

        def entered(self: Any) -> None:
            if log.here() and not belong_to_checkpointing((self.pack_hook, self.unpack_hook)):
                _push((reporting(self.pack_hook), self.unpack_hook))
            else:
                enter(self)

        return entered

    def _disabling(self, disable: Callable[[str], AbstractContextManager[None]]) -> Callable[[str], Any]:
        @contextmanager
        def disabled(error_message: str) -> Iterator[None]:
            if not self._log.here():
                with disable(error_message):
                    yield
                return
            self._log.unseen.note("saved", "saved", NOT_SAVED)
            with self.aside(), disable(error_message):
                yield

        return disabled

    def _pack(self, tensor: torch.Tensor) -> Packed:
        if _function_modes() or type(tensor) not in PLAIN_TYPES:
            return without_torch_function(self._save_and_pack)(tensor)
        return self._save_and_pack(tensor)

    def _save_and_pack(self, tensor: torch.Tensor) -> Packed:
        self._log.save(tensor)
        version = tensor._version
        node = tensor.grad_fn
        if node is None or not _saves_own_result(node) or self._log.traced():
            return tensor, version, ""
        output_text = f", which is output {tensor.output_nr} of {_NODE_SUFFIX.sub('', node.name())},"
        if type(tensor) is not torch.Tensor:
            return self._log.aside(tensor.detach), version, output_text
        with torch._C._DisableTorchDispatch():  # hide this operator from the program's modes
            return tensor.detach(), version, output_text

    def _reporting(self, program_pack: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        """`program_pack`, followed by a report to the log of what it returns."""

        def pack(tensor: torch.Tensor) -> Any:
            packed = program_pack(tensor)
            if self._log.here():
                self._log.save((packed,))
            return packed

        return pack


def unpack(packed: Packed) -> torch.Tensor:
    """The saved tensor. Raises RuntimeError if it has changed: with hooks autograd does not check that."""
    tensor, version, _ = packed
    if type(tensor) in PLAIN_TYPES and not _function_modes():
        changed = tensor._version != version
    else:
        changed = without_torch_function(getattr)(tensor, "_version") != version
    if changed:
        raise RuntimeError(without_torch_function(_changed_message)(*packed))
    if (packs := _reading.unpacked) is not None:
        packs.append(packed)
    return tensor


def _reading_originals(saved_property: Any) -> property:
    def saved_tensors(function: Any) -> Any:
        outer_packs, packs = _reading.unpacked, list[Packed]()
        _reading.unpacked = packs
        try:
            unpacked = saved_property.__get__(function)
        finally:
            _reading.unpacked = outer_packs
        if len(packs) != sum(tensor is not None for tensor in unpacked):  # other hooks packed them
            return unpacked
        remaining = iter(packs)
        return tuple(None if tensor is None else _original(tensor, *next(remaining)) for tensor in unpacked)

    return property(saved_tensors)


def _original(unpacked: torch.Tensor, saved: torch.Tensor, version: int, output_text: str) -> torch.Tensor:
    """The tensor that was saved, or `unpacked`, autograd's version of it, if an alias was saved."""
    return unpacked if output_text else saved


def _changed_message(tensor: torch.Tensor, version: int, output_text: str) -> str:
    """autograd's message for a tensor that was saved at `version` and has another version now."""
    if not output_text and tensor.grad_fn is not None:
        output_text = (
            f", which is output {tensor.output_nr} of {_NODE_SUFFIX.sub('', tensor.grad_fn.name())},"
        )
    hint = (
        "the backtrace further above shows the operation that failed to compute its gradient. The variable in question "
        "was changed in there or anywhere later. Good luck!"
        if torch.is_anomaly_enabled()
        else "enable anomaly detection to find the operation that failed to compute its gradient, with "
        "torch.autograd.set_detect_anomaly(True, check_nan=False)."
    )
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {[*tensor.shape]}]{output_text} is at version {tensor._version}; expected version {version} "
        f"instead. Hint: {hint}"
    )


def _saves_own_result(node: Any) -> bool:
    """Whether `node` is being created and saves its own result. For a Python function this is always possible."""
    return isinstance(node, torch._C._FunctionBase) or node._sequence_nr() == _next_number() - 1


def next_node_number() -> int:
    """The number of autograd's next node in this thread."""
    return int(_next_number())


def saved_by(tensors: Iterable[torch.Tensor], since: int) -> Iterator[torch.Tensor]:
    """What autograd keeps for the backward of `tensors`, in nodes with numbers from `since` on."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors]
    visited = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited or hasattr(node, "variable") or node._sequence_nr() < since:
            continue
        visited.add(node)
        nodes += [next_node for next_node, _ in node.next_functions]
        for name in _SAVED_ATTRIBUTES if hasattr(node, "saved_tensors") else dir(node):
            if name in _SAVED_ATTRIBUTES or name.startswith("_saved_"):
                try:
                    yield from tensors_in((getattr(node, name, None),))
                except RuntimeError:  # changed in place, or freed
                    continue


def belong_to_checkpointing(hooks: Hooks) -> bool:
    """Whether these are hooks of torch's checkpointing, which has an observer of its own."""
    return getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__


def _remove(hooks: Hooks) -> None:
    """Remove these hooks, but none that were entered after them."""
    later_hooks: list[Hooks] = []
    while (current := top_hooks()) is not None:
        _stack._pop_saved_tensors_default_hooks()
        if current == hooks:
            break
        later_hooks.append(current)
    for current in reversed(later_hooks):
        _push(current)


def top_hooks() -> Hooks | None:
    """The hooks that pack what autograd saves now."""
    hooks: Hooks | None = _stack._top_saved_tensors_default_hooks(True)
    return hooks


def _push(hooks: Hooks) -> None:
    _stack._push_saved_tensors_default_hooks(*hooks)
