"""The owners of storages. They are asked for their claims again whenever these may have changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from harness.ledger import owners
from harness.ledger.categories import CATEGORIES
from harness.ledger.log import RANK, Log
from harness.ledger.modules import Modules, original
from harness.ledger.observers import watch_offloaded_cache
from harness.ledger.patch import DoesNotFit
from harness.ledger.tensors import device_of, parts_of, storage_of, tensors_in, without_torch_function

OWNED_CATEGORIES = ("parameters", "gathered", "gradients", "optimizer", "kv_cache", "communication")
"""Categories that owners hold, so that they can be summed without a log."""

Claims = partial[Iterator[owners.Claim]]


class Roster:
    """The owners of a ledger: discovered ones by weak references, passed ones by strong references."""

    def __init__(self, log: Log, modules: Modules, discover: bool) -> None:
        self._log, self._modules, self._discover = log, modules, discover
        self.models: list[torch.nn.Module] = []
        self._owners: dict[int, Claims] = {}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._caches: dict[int, Claims] = {}
        self._discovered: WeakKeyDictionary[Any, Callable[[Any], Iterator[owners.Claim]]] = (
            WeakKeyDictionary()
        )
        self.engine: Any = None
        self._hook_handles: dict[int, RemovableHandle] = {}  # by parameter
        self._hooks_enabled = False

    @without_torch_function
    def own(self, model: Any, optimizer: Any, engine: Any, cache: Any) -> None:
        """Add these owners, and let all owners claim."""
        new: list[Claims] = []
        if model is not None:
            inner = original(model)
            self._add_model(inner)
            new.append(partial(owners.module_claims, inner))
            self._owners[id(model)] = new[-1]
        if optimizer is not None:
            new.append(partial(owners.optimizer_claims, optimizer))
            self._owners[id(optimizer)] = new[-1]
            if isinstance(optimizer, torch.optim.Optimizer):
                self._optimizers[id(optimizer)] = optimizer
        if engine is not None:
            self._add_model(engine.module)
            self.engine = engine
            new.append(partial(owners.engine_claims, engine))
            self._owners[id(engine)] = new[-1]
        if cache is not None:
            if id(cache) not in self._caches and getattr(cache, "offloading", False):
                self._watch_offloaded(cache)
            new.append(partial(owners.cache_claims, cache))
            self._caches[id(cache)] = new[-1]
        if self._log.recording:
            for claims in new:
                for claim in claims():
                    self._log.claim(*claim, base=True)
        self.walk()

    def _watch_offloaded(self, cache: Any) -> None:
        try:
            watch_offloaded_cache(cache, self.claim)
        except DoesNotFit as error:
            consequence = "what an offloaded cache has on the device is not named"
            self._log.unseen.leave_out(error, "storages", consequence)

    @without_torch_function
    def disown(self, owner: Any) -> None:
        """Remove `owner`. What it named keeps its name."""
        self.walk()
        for owners_by_id in (self._owners, self._caches, self._optimizers):
            owners_by_id.pop(id(owner), None)
        if isinstance(owner, torch.nn.Module | torch.optim.Optimizer):
            self._discovered.pop(owner, None)

    @without_torch_function
    def claim(self, category: str, name: str, tensor: torch.Tensor) -> None:
        """`Log.claim`, if the log records."""
        if self._log.recording:
            self._log.claim(category, name, tensor)

    @without_torch_function
    def walk(self) -> None:
        """Let every owner claim its storages."""
        if self._log.recording:
            for category, name, tensor in self._claims():
                self._log.claim(category, name, tensor)
                if category == "parameters" and self._unhooked(tensor):
                    self._hook_parameter(name, tensor)  # the parameter is new
            for owner in [*self._discovered]:
                self._claim_discovered(owner)

    @without_torch_function
    def open(self) -> None:
        """Let every owner claim what existed before the log, which begins now."""
        for claim in self._claims():
            self._log.claim(*claim, base=True)

    @without_torch_function
    def walk_caches(self) -> None:
        """Let the caches claim keys and values."""
        for claims in self._caches.values():
            for claim in claims():
                self._log.claim(*claim)

    @without_torch_function
    def find_model(self, module: torch.nn.Module) -> None:
        """Add `module` as an owner, unless it is known or part of a known one."""
        module = original(module)
        if module not in self._modules.names:
            self._discover_owner(module, owners.module_claims)

    @without_torch_function
    def find_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Add `optimizer` as an owner, unless it is known."""
        self._discover_owner(optimizer, owners.optimizer_claims)

    def _discover_owner(self, owner: Any, claims: Callable[[Any], Iterator[owners.Claim]]) -> None:
        """Add `owner`, which the caller did not pass. It and its storages may be from before the block."""
        if self._discover and owner not in self._discovered and id(owner) not in self._owners:
            self._discovered[owner] = claims
            if isinstance(owner, torch.nn.Module):
                self._modules.name(owner)
                self._hook_model(owner)
            self._claim_discovered(owner)

    @without_torch_function
    def totals(self, device: str) -> dict[str, int | None]:
        """Bytes that owners hold now, by category. None: only a log sees this category."""
        by_storage: dict[int, tuple[str, int]] = {}
        for category, _, tree in self._claims():
            for tensor in (part for each in tensors_in(tree) for part in _with_storage(each)):
                storage = storage_of(tensor)
                if storage is None or device_of(tensor) != device:
                    continue
                earlier = by_storage.get(storage._cdata)
                if earlier is None or RANK[category] < RANK[earlier[0]]:
                    by_storage[storage._cdata] = category, storage.nbytes()
        totals: dict[str, int | None] = dict.fromkeys(CATEGORIES)
        totals.update(
            {name: sum(n for c, n in by_storage.values() if c == name) for name in OWNED_CATEGORIES}
        )
        return totals

    @without_torch_function
    def versions(self) -> int:
        """A number that grows with every optimizer step, seen or not."""
        groups = (group for optimizer in self._optimizers.values() for group in optimizer.param_groups)
        return sum(parameter._version for group in groups for parameter in group["params"])

    def _claims(self) -> Iterator[owners.Claim]:
        asked: list[Any] = []
        for claims in (*self._owners.values(), *self._caches.values()):
            try:
                yield from claims(asked=asked) if claims.func is owners.engine_claims else claims()
                asked.append(claims.args[0])
            except Exception as error:  # an error of the owner's code, or of the ledger
                self._log.report_failure(f"what {type(claims.args[0]).__name__} holds", error)

    def _claim_discovered(self, owner: Any) -> None:
        for claim in self._discovered[owner](owner):
            self._log.claim(*claim, base=True)

    def _add_model(self, model: torch.nn.Module) -> None:
        self._modules.name(model)
        if not any(model is owned_model for owned_model in self.models):
            self.models.append(model)
            self._hook_model(model)

    # -- gradients: each is named at its creation, because its owner may free it within the backward

    @contextmanager
    def watching_gradients(self) -> Iterator[None]:
        """Name gradients at their creation inside this context."""
        self.hook(True)
        try:
            yield
        finally:
            self.hook(False)

    @without_torch_function
    def hook(self, enabled: bool) -> None:
        """Hook all parameters to name their gradients from now on. If False, remove all hooks."""
        self._hooks_enabled = enabled
        for handle in self._hook_handles.values():
            handle.remove()
        self._hook_handles.clear()
        discovered = (owner for owner in self._discovered if isinstance(owner, torch.nn.Module))
        for model in (*self.models, *discovered) if enabled else ():
            self._hook_model(model)

    def _hook_model(self, model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self._hook_parameter(name, parameter)

    def _hook_parameter(self, name: str, tensor: torch.Tensor) -> None:
        if self._hooks_enabled and self._unhooked(tensor) and _takes_hook(tensor):
            hook = partial(self._gradient_created, name)
            self._hook_handles[id(tensor)] = tensor.register_post_accumulate_grad_hook(hook)

    def _unhooked(self, tensor: torch.Tensor) -> bool:
        handle = self._hook_handles.get(id(tensor))
        # without its dict, the hook belongs to an earlier parameter with this id
        return handle is None or handle.hooks_dict_ref() is None

    @without_torch_function
    def _gradient_created(self, name: str, parameter: torch.nn.Parameter) -> None:
        if not self._log.here():
            return
        for claim in owners.parameter_claims(name, parameter):
            self._log.claim(*claim)
        if self.engine is not None:
            for claim in owners.bucket_claims(self.engine):
                self._log.claim(*claim)


def _takes_hook(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad and not is_lazy(tensor)


def _with_storage(tensor: torch.Tensor) -> list[torch.Tensor]:
    """`tensor`, or its parts if it has no storage."""
    return [tensor] if storage_of(tensor) is not None else parts_of(tensor)
