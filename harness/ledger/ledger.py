"""`Ledger`: owners and phases in, peaks and books out."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from time import time_ns
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch

from harness.ledger import owners
from harness.ledger.allocator import CpuAllocator, CudaAllocator
from harness.ledger.books import Books, at_allocator_peak
from harness.ledger.categories import CATEGORIES
from harness.ledger.clock import Times
from harness.ledger.collectives import settle
from harness.ledger.events import Event, Operator, Where
from harness.ledger.forwards import Forwards, in_flight, most_saved
from harness.ledger.log import RANK, Log
from harness.ledger.modules import Modules, in_backward
from harness.ledger.observers import (
    leaving_out_shapes,
    watch_moves,
    watching_checkpoints,
    watching_saved,
    watching_steps,
)
from harness.ledger.tensors import device_of, tensors_in
from harness.ledger.timeline import Category, Peak, Phase, replay
from harness.ledger.work import Work

MODES = ("exact", "phases", "off")
HELD = ("parameters", "gathered", "gradients", "optimizer", "kv_cache", "communication")
"""The categories that owners hold, and can be summed without a log."""

Claims = Callable[[], Iterator[owners.Claim]]


class Account(NamedTuple):
    """What a ledger measured."""

    peak: Peak | None
    categories: dict[str, Category]
    phases: list[Phase]
    books: Books
    forwards: Forwards | None = None


class Ledger:
    """Accounts for memory inside its `with` block, in this thread.

    `mode="exact"` sees every tensor; `"phases"` sums what owners hold at the end of each phase; `"off"` does
    nothing. With `steps`, an exact ledger goes on as `"phases"` from that step on. Owners may be given now or,
    with `own`, when they exist. Without `phase` the phases are read off the loop itself: a forward, its
    backward, the optimizer's step.

    `settle_collectives=True` makes frees after collectives happen in an order that repeats (`observers.settle`);
    then every rank must have such a ledger, for it is a collective itself.

    `allocator=False` holds the books against no allocator: where tensors are fake, nothing is allocated. `block`
    rounds each storage up to a multiple of so many bytes, as the allocator that is missing would.

    With `discover`, modules that are called from outside of all others and optimizers that step are owned without a
    word, for as long as they live. With `lines`, each storage has the line of the source that made it.

    It accounts for one kind of device, "cpu" or "cuda": what is said, else the model's, else the GPU if it is in use.

    Raises ValueError for an unknown mode. A tensor that was alive before the block counts if an owner names it.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        optimizer: Any = None,
        engine: Any = None,
        cache: Any = None,
        *,
        mode: str = "exact",
        steps: int | None = None,
        settle_collectives: bool = False,
        device: str | None = None,
        allocator: bool = True,
        block: int = 1,
        discover: bool = False,
        lines: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: a ledger is one of {', '.join(MODES)}")
        self.mode, self.steps = mode, steps
        self._settle = settle_collectives
        self.exact = False  # whether every tensor is being seen now
        self.device = device or _device_of(model)
        self._log, self._times = Log(self.device, block, lines), Times(self.device == "cuda")
        self._modules = Modules(self._log, self._forward_begins, self._forward_ends)
        self._allocator = (CudaAllocator if self.device == "cuda" else CpuAllocator)() if allocator else None
        self._seeing, self._instruments = ExitStack(), ExitStack()
        self._owners: dict[int, Claims] = {}
        self._caches: dict[int, Claims] = {}
        self._models: list[torch.nn.Module] = []
        self._discover = discover
        self._found: WeakKeyDictionary[Any, Callable[[Any], Iterator[owners.Claim]]] = WeakKeyDictionary()
        self._engine: Any = None
        self._told = False  # somebody names the phases; nothing is read off the loop
        self._stepped = False
        self._broke: Where | None = None
        self._steady: dict[
            tuple[str, int], dict[str, int | None]
        ] = {}  # what each phase last held, in phases mode
        self._account = Account(None, {}, [], Books())
        self.own(model=model, optimizer=optimizer, engine=engine, cache=cache)

    def __enter__(self) -> Self:
        if self.mode == "exact":
            self._begin()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.enough()

    # -- owners ------------------------------------------------------------------------------------------------

    def own(
        self,
        model: torch.nn.Module | None = None,
        optimizer: Any = None,
        engine: Any = None,
        cache: Any = None,
    ) -> None:
        """Let these name their storages, now and at the end of every phase. An engine speaks for its optimizer too."""
        if self.mode == "off":
            return
        if model is not None:
            self._own_model(model)
            self._owners[id(model)] = partial(owners.module_claims, model)
        if optimizer is not None:
            self._owners[id(optimizer)] = partial(owners.optimizer_claims, optimizer)
        if engine is not None:
            self._own_model(engine.module)
            self._engine = engine
            self._owners[id(engine)] = partial(owners.engine_claims, engine)
        if cache is not None:
            if id(cache) not in self._caches and getattr(cache, "offloading", False):
                watch_moves(cache, self.claim)
            self._caches[id(cache)] = partial(owners.cache_claims, cache)
        self._walk()

    def disown(self, owner: Any) -> None:
        """Forget `owner`: what it named keeps its name, and it is asked no more."""
        self._walk()
        self._owners.pop(id(owner), None)
        self._caches.pop(id(owner), None)

    def claim(self, category: str, name: str, tensor: torch.Tensor) -> None:
        """Say that `tensor`'s storage is `category`. Raises ValueError for a word that is not one."""
        if category not in CATEGORIES:
            raise ValueError(f"category={category!r}: a storage is one of {', '.join(CATEGORIES)}")
        if self.exact:
            self._log.claim(category, name, tensor)

    def _own_model(self, model: torch.nn.Module) -> None:
        self._modules.name(model)
        if not any(model is known for known in self._models):
            self._models.append(model)
            if self.exact:
                self._hook_gradients(model)

    def _hook_gradients(self, model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(partial(self._gradient_made, name))
                self._instruments.callback(handle.remove)

    def _gradient_made(self, name: str, parameter: torch.nn.Parameter) -> None:
        for claim in owners.parameter_claims(name, parameter):
            self._log.claim(*claim)
        if self._engine is not None:
            for claim in owners.bucket_claims(self._engine):
                self._log.claim(*claim)

    def _walk(self, base: bool = False) -> None:
        """Ask every owner."""
        if self.exact:
            for claims in (*self._owners.values(), *self._caches.values()):
                for claim in claims():
                    self._log.claim(*claim, base=base)
            for owner in [*self._found]:
                self._ask(owner)

    def _find(self, owner: Any, claims: Callable[[Any], Iterator[owners.Claim]]) -> None:
        """Own `owner` weakly, which nobody has named: it, or what it has, may be from before the block."""
        if self._discover and owner not in self._found and id(owner) not in self._owners:
            self._found[owner] = claims
            if isinstance(owner, torch.nn.Module):
                self._modules.name(owner)
                self._hook_gradients(owner)
            self._ask(owner)

    def _ask(self, found: Any) -> None:
        for claim in self._found[found](found):
            self._log.claim(*claim, base=True)

    # -- phases ------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str, step: int = 0, micro_batch: int = 0, *, again: bool = False) -> Iterator[None]:
        """Within it, everything happens in phase `name` of `step` and `micro_batch`.

        With `again` it will be entered once more, and no owner is asked at its end: for what is short and frequent.
        """
        self.begins(step)
        before, module, told = self._log.where, self._log.module, self._told
        self._told = True
        here = Where(step, name, micro_batch)
        self._enter(here)
        began = None if self.exact else self._times.moment()
        try:
            yield
        except BaseException:
            self._broke = self._broke or self._log.where
            raise
        finally:
            if began is not None:
                self._times.add(here, began)
            if again:
                self._enter(before)
            else:
                self._leave(before)
            self._log.module, self._told = module, told  # where a backward ends is no module's

    def begins(self, step: int) -> None:
        """Step `step` begins: say so where a run lets go of anything before the first phase of it."""
        if self.steps is not None and step >= self.steps:
            self.enough()

    def enough(self) -> None:
        """From here on see no more than `"phases"` does, as from step `steps` on."""
        if self.exact:
            self._finish()

    @property
    def where(self) -> Where:
        """The phase that is running now, or the one in which the first error left a phase."""
        return self._broke or self._log.where

    def _enter(self, where: Where) -> None:
        if self.exact:
            self._log.enter(where)
        else:
            self._log.where = where

    def _leave(self, before: Where) -> None:
        if self.exact:
            self._walk()
        elif self.mode != "off":
            self._sum_owners()
        self._enter(before)

    def _sum_owners(self) -> None:
        """Append what owners hold at the end of this phase, unless it held as much when it last ended.

        What only a log sees is not measured.
        """
        held: dict[int, tuple[str, int]] = {}
        for claims in (*self._owners.values(), *self._caches.values()):
            named = ((category, part) for category, _, held_by in claims() for part in tensors_in(held_by))
            for category, tensor in named:
                if device_of(tensor) != self.device:
                    continue
                storage = tensor.untyped_storage()
                known = held.get(storage._cdata)
                if known is None or RANK[category] < RANK[known[0]]:
                    held[storage._cdata] = category, storage.nbytes()
        totals: dict[str, int | None] = dict.fromkeys(CATEGORIES)
        totals.update({name: sum(n for c, n in held.values() if c == name) for name in HELD})
        where = self._log.where
        if self._steady.get(where[1:]) != totals:
            self._steady[where[1:]] = totals
            end = torch.cuda.memory_allocated() if self.device == "cuda" else None
            self._account.phases.append(Phase(where, None, end, totals))

    def _forward_begins(self, module: torch.nn.Module) -> None:
        if module not in self._modules.names:
            self._find(module, owners.module_claims)
        if not self._told:
            where = self._log.where
            step = where.step + 1 if self._stepped else where.step
            first = self._stepped or where.phase == "idle"
            self._stepped = False
            self._turn(Where(step, "forward", 0 if first else where.micro_batch + 1))
        self._log.work.passed()

    def _forward_ends(self) -> None:
        for claims in self._caches.values():
            for claim in claims():
                self._log.claim(*claim)

    def _follow(self) -> None:
        """Before an operator: has backward begun, or ended?"""
        if self._told:
            return
        where = self._log.where
        if in_backward():
            if where.phase == "forward":
                self._turn(where._replace(phase="backward"))
        elif where.phase == "backward":
            self._log.module = ""
            self._turn(Where(where.step, "step", where.micro_batch))

    def _optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        self._stepped = True
        self._find(optimizer, owners.optimizer_claims)
        self._walk()

    def _turn(self, where: Where) -> None:
        self._walk()
        self._log.enter(where)

    # -- what was measured -------------------------------------------------------------------------------------

    def account(self) -> Account:
        """What was measured so far; while exact, up to this moment and without the allocator's side."""
        if not self.exact:
            return self._account
        events = list(self._log.events)
        return Account(*self._replay(events), Books(), in_flight(events))

    def _replay(self, events: list[Event]) -> tuple[Peak, dict[str, Category], list[Phase]]:
        peak, categories, phases = replay(events)
        for phase in phases:
            phase.work = self._log.work.of(phase.where)
        return peak, categories, phases

    @property
    def events(self) -> list[Event]:
        """Every birth and death that was seen, and every phase's start, in order."""
        return self._log.events

    # -- what was done -----------------------------------------------------------------------------------------

    def work(self) -> dict[Where, Work]:
        """What was done so far, by where; nothing while that is not seen."""
        return self._log.work.all() if self.exact else {}

    def fill_in(self, where: Where, work: Work | None) -> None:
        """Count `work` as done in `where`, by a caller that knows what it left out; None: it does not."""
        self._log.work.add(where, work)

    def seconds(self) -> dict[str, dict[int, float]]:
        """What each phase took by step, over its micro-batches, where nothing slowed it. Waits for the device."""
        return self._times.by_phase()

    def uncounted(self) -> AbstractContextManager[None]:
        """Within it nothing counts as work: for what a run itself would not do."""
        return self._log.work.off()

    @property
    def last_peak(self) -> Peak | None:
        """The peak of what has been measured exactly to the end; None while it is still being measured."""
        return self._account.peak

    @property
    def peak(self) -> Peak:
        """The moment of most bytes. Raises LookupError where nothing was measured exactly."""
        peak = self.account().peak
        if peak is None:
            raise LookupError(f"mode={self.mode!r} measures no peak; mode='exact' does")
        return peak

    @property
    def categories(self) -> dict[str, Category]:
        """Each category's own peak and end, in bytes."""
        return self.account().categories

    @property
    def phases(self) -> list[Phase]:
        """Every phase, in order of its first entry."""
        return self.account().phases

    @property
    def forwards(self) -> Forwards | None:
        """The most forwards that waited for their backward at once; None where nothing was measured exactly."""
        return self.account().forwards

    @property
    def saved(self) -> int:
        """The most bytes of activations that autograd kept for backward at once; 0 where nothing saw them."""
        return most_saved(self._log.events)

    @property
    def allocator(self) -> Books:
        """The allocator's own peak, and what of it is unattributed."""
        return self.account().books

    @contextmanager
    def opaque(self, name: str, work: Work | None = None) -> Iterator[None]:
        """Within it nobody sees but the allocator: a compiled program has no operators to see, and takes no hooks.

        What it makes and lets go of is `kernel`, as one operator's scratch; what it leaves is named by owners, or when
        an operator takes it. It counts as `work`, where its caller knows how much that is.
        """
        if not self.exact:
            yield
            return
        log, began = self._log, time_ns()
        log.work.add(log.where, work)
        self._instruments.close()
        try:
            with log.blind():
                yield
        finally:
            log.operators.append(Operator(began, time_ns(), log.where, log.module, name))
            self._watch()

    def _begin(self) -> None:
        self.exact = True
        if self._allocator is not None:
            self._allocator.start()
        self._walk(base=True)
        self._log.follow = self._follow
        self._log.settle = settle if self._settle else None
        self._seeing.enter_context(self._log)
        self._watch()

    def _watch(self) -> None:
        enter = self._instruments.enter_context
        enter(self._modules.watching())
        enter(watching_steps(self._optimizer_stepped))
        enter(watching_saved(self._log))
        enter(watching_checkpoints(self._log))
        enter(leaving_out_shapes())
        for model in (*self._models, *(each for each in self._found if isinstance(each, torch.nn.Module))):
            self._hook_gradients(model)

    def _finish(self) -> None:
        self._walk()
        self._instruments.close()
        self._seeing.close()
        self.exact = False
        events, operators = self._log.events, self._log.operators
        peak, categories, phases = self._replay(events)
        books = Books()
        if isinstance(self._allocator, CudaAllocator):
            books = Books(self._allocator.source, self._allocator.highest())
        elif self._allocator is not None and (allocations := self._allocator.stop()) is not None:
            peak, books = at_allocator_peak(events, operators, allocations, self._allocator.source)
        self._account = Account(peak, categories, phases, books, in_flight(events))


def _device_of(model: torch.nn.Module | None) -> str:
    parameter = None if model is None else next(model.parameters(), None)
    if parameter is not None:
        return parameter.device.type
    return "cuda" if torch.cuda.is_initialized() else "cpu"
