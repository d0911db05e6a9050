"""Who has said what is theirs, and is asked again whenever it may have changed."""

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
from harness.ledger.observers import watch_moves
from harness.ledger.tensors import device_of, parts_of, storage_of, tensors_in, unnoticed

HELD = ("parameters", "gathered", "gradients", "optimizer", "kv_cache", "communication")
"""The categories that owners hold, and can be summed without a log."""

Claims = partial[Iterator[owners.Claim]]


class Roster:
    """The owners of a ledger. Those that are found are held weakly, those that are given strongly."""

    def __init__(self, log: Log, modules: Modules, discover: bool) -> None:
        self._log, self._modules, self._discover = log, modules, discover
        self._models: list[torch.nn.Module] = []
        self._owners: dict[int, Claims] = {}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._caches: dict[int, Claims] = {}
        self._found: WeakKeyDictionary[Any, Callable[[Any], Iterator[owners.Claim]]] = WeakKeyDictionary()
        self._engine: Any = None
        self._hooks: dict[int, RemovableHandle] = {}  # by parameter
        self._hooking = False

    @unnoticed
    def own(self, model: Any, optimizer: Any, engine: Any, cache: Any) -> None:
        """Take these as owners, and ask all."""
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
            self._engine = engine
            new.append(partial(owners.engine_claims, engine))
            self._owners[id(engine)] = new[-1]
        if cache is not None:
            if id(cache) not in self._caches and getattr(cache, "offloading", False):
                watch_moves(cache, self.claim)
            new.append(partial(owners.cache_claims, cache))
            self._caches[id(cache)] = new[-1]
        if self._log.recording:
            for claims in new:
                for claim in claims():
                    self._log.claim(*claim, base=True)
        self.walk()

    @unnoticed
    def disown(self, owner: Any) -> None:
        """Forget `owner`: what it named keeps its name, and it is asked no more."""
        self.walk()
        for known in (self._owners, self._caches, self._optimizers):
            known.pop(id(owner), None)
        if isinstance(owner, torch.nn.Module | torch.optim.Optimizer):
            self._found.pop(owner, None)

    @unnoticed
    def claim(self, category: str, name: str, tensor: torch.Tensor) -> None:
        """As the log's, while it records."""
        if self._log.recording:
            self._log.claim(category, name, tensor)

    @unnoticed
    def walk(self) -> None:
        """Ask every owner."""
        if self._log.recording:
            for category, name, tensor in self._claims():
                self._log.claim(category, name, tensor)
                if category == "parameters" and self._unhooked(tensor):
                    self._hook(name, tensor)  # it came later
            for owner in [*self._found]:
                self._ask(owner)

    @unnoticed
    def open(self) -> None:
        """Ask every owner for what was there before the log, which begins now."""
        for claim in self._claims():
            self._log.claim(*claim, base=True)

    @unnoticed
    def walk_caches(self) -> None:
        """Ask those who hold keys and values."""
        for claims in self._caches.values():
            for claim in claims():
                self._log.claim(*claim)

    @unnoticed
    def find_model(self, module: torch.nn.Module) -> None:
        """Own `module`, unless it is known or part of one that is."""
        module = original(module)
        if module not in self._modules.names:
            self._find(module, owners.module_claims)

    @unnoticed
    def find_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Own `optimizer`, unless it is known."""
        self._find(optimizer, owners.optimizer_claims)

    def _find(self, owner: Any, claims: Callable[[Any], Iterator[owners.Claim]]) -> None:
        """Own `owner`, which nobody has named: it, or what it has, may be from before the block."""
        if self._discover and owner not in self._found and id(owner) not in self._owners:
            self._found[owner] = claims
            if isinstance(owner, torch.nn.Module):
                self._modules.name(owner)
                self._hook_model(owner)
            self._ask(owner)

    @unnoticed
    def totals(self, device: str) -> dict[str, int | None]:
        """What owners hold now, by category, in bytes. None: only a log sees it."""
        held: dict[int, tuple[str, int]] = {}
        for category, _, owned in self._claims():
            for tensor in (part for each in tensors_in(owned) for part in _stored(each)):
                storage = storage_of(tensor)
                if storage is None or device_of(tensor) != device:
                    continue
                known = held.get(storage._cdata)
                if known is None or RANK[category] < RANK[known[0]]:
                    held[storage._cdata] = category, storage.nbytes()
        totals: dict[str, int | None] = dict.fromkeys(CATEGORIES)
        totals.update({name: sum(n for c, n in held.values() if c == name) for name in HELD})
        return totals

    @unnoticed
    def versions(self) -> int:
        """A number that grows when an optimizer makes a step, seen or not."""
        groups = (group for each in self._optimizers.values() for group in each.param_groups)
        return sum(parameter._version for group in groups for parameter in group["params"])

    def _claims(self) -> Iterator[owners.Claim]:
        for claims in (*self._owners.values(), *self._caches.values()):
            try:
                yield from claims()
            except Exception as error:  # of the owner's own code, or of ours
                self._log.missed(f"what {type(claims.args[0]).__name__} holds", error)

    def _ask(self, found: Any) -> None:
        for claim in self._found[found](found):
            self._log.claim(*claim, base=True)

    def _add_model(self, model: torch.nn.Module) -> None:
        self._modules.name(model)
        if not any(model is known for known in self._models):
            self._models.append(model)
            self._hook_model(model)

    # -- gradients: each is named as it is made, for its owner may let it go within the backward

    @contextmanager
    def watching_gradients(self) -> Iterator[None]:
        """Within it a gradient has its name from its birth."""
        self.hook(True)
        try:
            yield
        finally:
            self.hook(False)

    @unnoticed
    def hook(self, hooking: bool) -> None:
        """From here on name gradients as they are made, or (False) leave no hook on any parameter."""
        self._hooking = hooking
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        found = (each for each in self._found if isinstance(each, torch.nn.Module))
        for model in (*self._models, *found) if hooking else ():
            self._hook_model(model)

    def _hook_model(self, model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self._hook(name, parameter)

    def _hook(self, name: str, tensor: torch.Tensor) -> None:
        if self._hooking and self._unhooked(tensor) and _takes_hook(tensor):
            hook = partial(self._gradient_made, name)
            self._hooks[id(tensor)] = tensor.register_post_accumulate_grad_hook(hook)

    def _unhooked(self, tensor: torch.Tensor) -> bool:
        handle = self._hooks.get(id(tensor))
        return handle is None or handle.hooks_dict_ref() is None  # another's, who was there before

    @unnoticed
    def _gradient_made(self, name: str, parameter: torch.nn.Parameter) -> None:
        if not self._log.here():
            return
        for claim in owners.parameter_claims(name, parameter):
            self._log.claim(*claim)
        if self._engine is not None:
            for claim in owners.bucket_claims(self._engine):
                self._log.claim(*claim)


def _takes_hook(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad and not is_lazy(tensor)


def _stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    """`tensor`, or those that hold its memory."""
    return [tensor] if storage_of(tensor) is not None else parts_of(tensor)
