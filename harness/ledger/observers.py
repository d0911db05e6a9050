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
from harness.ledger.replaced import replaced
from harness.ledger.tensors import tensors_in


@contextmanager
def watching_checkpoints(log: Log) -> Iterator[None]:
    """Tell `log` what torch's checkpointing keeps beside autograd, and when it computes again.

    It keeps the state of the random numbers, which no operator makes, and the results that its policy chooses.
    """
    own: Any = torch.utils.checkpoint
    take = torch.get_rng_state

    def taken() -> torch.Tensor:
        state = take()
        if log.here():
            log.see(state, "get_rng_state", time_ns())
            if not in_backward() and log.makes == "activations":
                log.save(state)
        return state

    class Kept(own._VersionWrapper):
        def __init__(self, val: Any) -> None:
            super().__init__(val)
            if isinstance(val, torch.Tensor) and log.here():
                log.save(val)

    class Again(own._recomputation_hook):
        def __enter__(self) -> Any:
            self._before = log.module, log.recomputing
            if log.here():
                log.recomputing = True
            return super().__enter__()

        def __exit__(self, *exc: Any) -> None:
            super().__exit__(*exc)
            if log.here():
                log.module, log.recomputing = self._before

    with ExitStack() as undo:
        for owner, name, stand_in in (
            (torch, "get_rng_state", taken),
            (own, "_VersionWrapper", Kept),
            (own, "_recomputation_hook", Again),
        ):
            undo.enter_context(replaced(owner, name, stand_in))
        yield


@contextmanager
def watching_sizes(log: Log) -> Iterator[None]:
    """Tell `log` of storages that are given another size by no operator, as FSDP lets go of what it gathered."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: Any) -> Any:
        made = resize(storage, size)
        if log.here():
            log.resized(storage)
        return made

    with replaced(torch.UntypedStorage, "resize_", resized):
        yield


@contextmanager
def watching_steps(log: Log, stepped: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    """Call `stepped` with any torch optimizer that has made a step."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if log.here():
            stepped(optimizer)

    handle = register_optimizer_step_post_hook(hook)
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

    with replaced(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen):
        yield
