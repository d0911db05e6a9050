"""Reports to the log what no operator shows: what autograd saves, recomputation, resizes and optimizer steps.

No observer changes a value or keeps a tensor alive. Each is removed when its context ends.
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
    """Report to `log` what torch's checkpointing keeps beside autograd, and when it recomputes.

    It keeps the state of the random number generator, which no operator returns, and the results that its policy
    chooses.
    """
    checkpoint: Any = torch.utils.checkpoint
    get_rng_state = torch.get_rng_state

    def get_and_save_rng_state() -> torch.Tensor:
        state = get_rng_state()
        if log.here():
            log.see(state, "get_rng_state", time_ns())
            if not in_backward() and log.makes == "activations":
                log.save(state)
        return state

    class SavedResult(checkpoint._VersionWrapper):
        def __init__(self, val: Any) -> None:
            super().__init__(val)
            if isinstance(val, torch.Tensor) and log.here():
                log.save(val)

    class Recomputation(checkpoint._recomputation_hook):
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
            (torch, "get_rng_state", get_and_save_rng_state),
            (checkpoint, "_VersionWrapper", SavedResult),
            (checkpoint, "_recomputation_hook", Recomputation),
        ):
            undo.enter_context(replaced(owner, name, stand_in))
        yield


@contextmanager
def watching_sizes(log: Log) -> Iterator[None]:
    """Report to `log` storages that are resized without an operator, as FSDP does to free gathered parameters."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: Any) -> Any:
        result = resize(storage, size)
        if log.here():
            log.resized(storage)
        return result

    with replaced(torch.UntypedStorage, "resize_", resized):
        yield


@contextmanager
def watching_steps(log: Log, stepped: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    """Call `stepped` after each step of any torch optimizer."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if log.here():
            stepped(optimizer)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def watch_offloaded_cache(cache: Any, claim: Callable[[str, str, torch.Tensor], None]) -> None:
    """Claim the layers of an offloaded `cache` while they are on the device. They move there one after another."""
    # a weak reference: with a strong one the cache would refer to itself and outlive its batch
    update, cache_ref = type(cache).update, weakref.ref(cache)

    def updated(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        own_cache = cache_ref()
        assert own_cache is not None  # the cache is being called
        for index in (layer_idx, (layer_idx + 1) % max(1, len(own_cache.layers))):
            for tensor in tensors_in(
                [*vars(own_cache.layers[index]).values()] if index < len(own_cache.layers) else []
            ):
                claim("kv_cache", f"layers[{index}]", tensor)
        output = update(own_cache, keys, values, layer_idx, *args, **kwargs)
        for tensor in tensors_in(output):
            claim("kv_cache", f"layers[{layer_idx}]", tensor)
        return output

    cache.update = updated


@contextmanager
def leaving_out_shapes() -> Iterator[None]:
    """Hide from all modes the operators that DTensor runs on fake tensors to learn the shape of a result.

    DTensor caches these shapes by operator for the life of the process.
    """
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate_hidden(self: Any, *arguments: Any) -> Any:
        with _disable_current_modes():
            return propagate(self, *arguments)

    with replaced(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_hidden):
        yield
