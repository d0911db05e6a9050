"""What tells the log where it is: hooks on modules, gradients, optimizers and autograd's saved tensors.

None of them changes a value or keeps a tensor alive; all of them go when their context ends.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import time_ns
from typing import Any

import torch
import torch.utils.checkpoint
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes

from harness.ledger.log import Log, tensors_in


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


@contextmanager
def watching_saved(log: Log) -> Iterator[None]:
    """Tell `log` what autograd saves for backward. The hooks change no value.

    With hooks, an operator that saves its own result is not let go without a backward: the tensor has the node, and the
    node the tensor. So what is not a leaf is saved as an alias without a node; a leaf as it is, for its data may be
    exchanged, as ZeRO-3 does.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        log.save(tensor)
        return tensor if tensor.is_leaf else log.aside(tensor.detach)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@contextmanager
def watching_checkpoints(log: Log) -> Iterator[None]:
    """Tell `log` what torch's checkpointing keeps beside autograd, and when it computes again.

    It keeps the state of the random numbers, which no operator makes, and the results that its policy chooses.
    """
    own: Any = torch.utils.checkpoint
    take = torch.get_rng_state

    def taken() -> torch.Tensor:
        state = take()
        log.see(state, "get_rng_state", time_ns())
        if not in_backward() and log.makes == "activations":
            log.save(state)
        return state

    class Kept(own._VersionWrapper):
        def __init__(self, val: Any) -> None:
            super().__init__(val)
            if isinstance(val, torch.Tensor):
                log.save(val)

    class Again(own._recomputation_hook):
        def __enter__(self) -> Any:
            self._before = log.module, log.recomputing
            log.recomputing = True
            return super().__enter__()

        def __exit__(self, *exc: Any) -> None:
            super().__exit__(*exc)
            log.module, log.recomputing = self._before

    with ExitStack() as undo:
        for owner, name, stand_in in (
            (torch, "get_rng_state", taken),
            (own, "_VersionWrapper", Kept),
            (own, "_recomputation_hook", Again),
        ):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stand_in)
        yield


@contextmanager
def watching_steps(stepped: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    """Call `stepped` with any torch optimizer that has made a step."""
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: stepped(optimizer))
    try:
        yield
    finally:
        handle.remove()


def watch_moves(cache: Any, claim: Callable[[str, str, torch.Tensor], None]) -> None:
    """Let `cache`, whose layers come to the device one after another and leave it, name them while they are there."""
    update, held = (
        type(cache).update,
        weakref.ref(cache),
    )  # weakly: it would keep itself, and live on past its batch

    def updated(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        mine = held()
        assert mine is not None  # it is being called
        for number in (layer_idx, (layer_idx + 1) % max(1, len(mine.layers))):
            for tensor in tensors_in(
                [*vars(mine.layers[number]).values()] if number < len(mine.layers) else []
            ):
                claim("kv_cache", f"layers[{number}]", tensor)
        made = update(mine, keys, values, layer_idx, *args, **kwargs)
        for tensor in tensors_in(made):
            claim("kv_cache", f"layers[{layer_idx}]", tensor)
        return made

    cache.update = updated


@contextmanager
def leaving_out_shapes() -> Iterator[None]:
    """Let DTensors try an operator on fake tensors, to learn what it makes of whole ones, where no mode is shown them.

    They remember the shapes by operator for as long as the process lives.
    """
    try_out = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(self: Any, *arguments: Any) -> Any:
        with _disable_current_modes():
            return try_out(self, *arguments)

    ShardingPropagator._propagate_tensor_meta_non_cached = unseen  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = try_out  # type: ignore[method-assign]


def settle(arguments: Any) -> None:
    """Wait until the process group among a collective's `arguments` has let go of what it was given.

    gloo's thread drops its references after the caller wakes, at a moment that no two runs share. A collective of
    no elements comes after it in the thread's queue. Point-to-point operators have no such pairing.
    """
    for argument in arguments:
        group = _group(argument)
        if group is not None:
            group.allreduce([torch.empty(0)]).wait()


def _group(argument: Any) -> Any:
    """The process group that `argument` is, or names; None where it is something else."""
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return torch.distributed.ProcessGroup.unbox(argument)
    if isinstance(argument, str):
        try:
            named: Any = argument
            return torch._C._distributed_c10d._resolve_process_group(named)
        except RuntimeError:  # how to reduce
            return None
    return argument if isinstance(argument, torch.distributed.ProcessGroup) else None
