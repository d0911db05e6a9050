"""Reports to the log what no operator shows: what autograd saves, recomputation, resizes and optimizer steps.

No observer changes a value or keeps a tensor alive. Each is removed when its context ends.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes

from harness.ledger.log import Log
from harness.ledger.modules import in_backward
from harness.ledger.patch import install, patched
from harness.ledger.patch_table import PATCHES
from harness.ledger.tensors import tensors_in


@contextmanager
def watching_checkpoints(log: Log) -> Iterator[None]:
    """Report to `log` what torch's checkpointing keeps beside autograd.

    It keeps the state of the random number generator, which no operator returns, and the results that its policy
    chooses.
    """

    def saving_state(get_rng_state: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def get_and_save_rng_state() -> torch.Tensor:
            state = get_rng_state()
            if log.here():
                log.see(state, "get_rng_state")
                if not in_backward() and log.makes == "activations":
                    log.save(state)
            return state

        return get_and_save_rng_state

    def saving_result(wrapper: Any) -> Any:
        class SavedResult(wrapper):
            def __init__(self, val: Any) -> None:
                super().__init__(val)
                if isinstance(val, torch.Tensor) and log.here():
                    log.save(val)

        return SavedResult

    with patched(
        PATCHES["torch.get_rng_state"].by(saving_state),
        PATCHES["torch.utils.checkpoint._VersionWrapper"].by(saving_result),
    ):
        yield


@contextmanager
def watching_recomputation(log: Log) -> Iterator[None]:
    """Report to `log` when torch's checkpointing recomputes."""

    def recomputing(hook: Any) -> Any:
        class Recomputation(hook):
            def __enter__(self) -> Any:
                self._before = log.module, log.recomputing
                if log.here():
                    log.recomputing = True
                return super().__enter__()

            def __exit__(self, *exc: Any) -> None:
                super().__exit__(*exc)
                if log.here():
                    log.module, log.recomputing = self._before

        return Recomputation

    with patched(PATCHES["torch.utils.checkpoint._recomputation_hook"].by(recomputing)):
        yield


@contextmanager
def watching_sizes(log: Log) -> Iterator[None]:
    """Report to `log` storages that are resized without an operator, as FSDP does to free gathered parameters."""

    def observing(resize: Callable[..., Any]) -> Callable[..., Any]:
        def resized(storage: torch.UntypedStorage, size: Any) -> Any:
            result = resize(storage, size)
            if log.here():
                log.resized(storage)
            return result

        return resized

    with patched(PATCHES["torch.UntypedStorage.resize_"].by(observing)):
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
    """Claim the layers of an offloaded `cache` while they are on the device. They move there one after another.

    Raises DoesNotFit.
    """
    # a weak reference: with a strong one the cache would refer to itself and outlive its batch
    update, cache_ref = type(cache).update, weakref.ref(cache)

    def updated(
        key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        own_cache = cache_ref()
        assert own_cache is not None  # the cache is being called
        for index in (layer_idx, (layer_idx + 1) % max(1, len(own_cache.layers))):
            for tensor in tensors_in(
                [*vars(own_cache.layers[index]).values()] if index < len(own_cache.layers) else []
            ):
                claim("kv_cache", f"layers[{index}]", tensor)
        output = update(own_cache, key_states, value_states, layer_idx, *args, **kwargs)
        for tensor in tensors_in(output):
            claim("kv_cache", f"layers[{layer_idx}]", tensor)
        return output

    install(PATCHES["transformers.cache_utils.Cache.update"].by(lambda _: updated, cache))


@contextmanager
def leaving_out_shapes() -> Iterator[None]:
    """Hide from all modes the operators that DTensor runs on fake tensors to learn the shape of a result.

    DTensor caches these shapes by operator for the life of the process.
    """

    def hidden(propagate: Callable[..., Any]) -> Callable[..., Any]:
        def propagate_hidden(self: Any, *arguments: Any) -> Any:
            with _disable_current_modes():
                return propagate(self, *arguments)

        return propagate_hidden

    with patched(
        PATCHES[
            "torch.distributed.tensor._sharding_prop.ShardingPropagator._propagate_tensor_meta_non_cached"
        ].by(hidden)
    ):
        yield
