"""What tells the log what no operator shows: what autograd saves, what is computed again, and optimizers' steps.

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
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes

from harness.ledger.log import Log
from harness.ledger.modules import in_backward
from harness.ledger.tensors import tensors_in


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
