"""`Ledger`: owners and phases in, peaks and books out."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Self

import torch

from harness.ledger.account import Account, closed, nothing, so_far
from harness.ledger.allocator import PROFILED, CpuAllocator, CudaAllocator
from harness.ledger.categories import CATEGORIES
from harness.ledger.collectives import settle
from harness.ledger.compiled import Compiled
from harness.ledger.events import Event, Where
from harness.ledger.in_flight import Forwards, most_saved
from harness.ledger.instruments import Instruments
from harness.ledger.log import Log
from harness.ledger.modules import Modules
from harness.ledger.phases import Phases
from harness.ledger.reconcile import Books
from harness.ledger.replay import Category, Peak, Phase
from harness.ledger.roster import Roster
from harness.ledger.timer import Times
from harness.ledger.unseen import Gap, Unseen
from harness.ledger.work import Work

MODES = ("exact", "phases", "off")

UNATTRIBUTED = (
    "made by no operator that the ledger was shown: by code that sets torch's dispatch modes aside, as tracing for a "
    "compiler does, or that allocates by itself"
)


class Ledger:
    """Accounts for memory inside its `with` block, in this thread.

    `mode="exact"` sees every tensor; `"phases"` sums what owners hold at the end of each phase; `"off"` does
    nothing. With `steps`, an exact ledger goes on as `"phases"` from that step on. Owners may be given now or,
    with `own`, when they exist. Without `phase` the phases are read off the loop itself: a forward, its
    backward, the optimizer's step.

    `settle_collectives=True` makes frees after collectives happen in an order that repeats (`collectives.settle`);
    then every rank must have such a ledger, for it is a collective itself.

    `allocator=False` holds the books against no allocator: where tensors are fake, nothing is allocated. `block`
    rounds each storage up to a multiple of so many bytes, as the allocator that is missing would. `kernel=False` leaves
    scratch inside kernels to the books: the peak is that of storages.

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
        kernel: bool = True,
        block: int = 1,
        discover: bool = False,
        lines: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: a ledger is one of {', '.join(MODES)}")
        self.mode, self.steps = mode, steps
        self.exact = False  # whether every tensor is being seen now
        self.device = device or _device_of(model)
        self._settle, self._with_allocator, self._kernel = settle_collectives, allocator, kernel
        self._unseen = Unseen()
        self._log = Log(self.device, block, lines, self._unseen)
        self._times = Times(self.device == "cuda")
        self._modules = Modules(self._log)
        self._roster = Roster(self._log, self._modules, discover)
        self._phases = Phases(self._log, self._roster)
        self._modules.entered, self._modules.left = self._phases.forward_begins, self._phases.forward_ends
        self._instruments = Instruments(self._log, self._modules, self._roster, self._phases)
        self._compiled = Compiled(
            self._log, self._modules, self._roster, self._phases, self._instruments.hidden
        )
        self._allocator: CpuAllocator | CudaAllocator | None = None
        self._entered = 0
        self._broke: Where | None = None
        self._steady: dict[
            tuple[str, int], dict[str, int | None]
        ] = {}  # what each phase last held, in phases mode
        self._account = nothing()
        self.own(model=model, optimizer=optimizer, engine=engine, cache=cache)

    def __enter__(self) -> Self:
        if not self._entered and self.mode == "exact":
            self._begin()
        self._entered += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._entered -= 1
        if not self._entered:
            self.enough()
            self._unseen.say()

    # -- owners ------------------------------------------------------------------------------------------------

    def own(
        self,
        model: torch.nn.Module | None = None,
        optimizer: Any = None,
        engine: Any = None,
        cache: Any = None,
    ) -> None:
        """Let these name their storages, now and at the end of every phase. An engine speaks for its optimizer too.

        What they hold from before the block counts from its beginning, whenever they are named.
        """
        if self.mode != "off":
            self._roster.own(model, optimizer, engine, cache)

    def disown(self, owner: Any) -> None:
        """Forget `owner`: what it named keeps its name, and it is asked no more."""
        self._roster.disown(owner)

    def claim(self, category: str, name: str, tensor: torch.Tensor) -> None:
        """Say that `tensor`'s storage is `category`. Raises ValueError for a word that is not one."""
        if category not in CATEGORIES:
            raise ValueError(f"category={category!r}: a storage is one of {', '.join(CATEGORIES)}")
        self._roster.claim(category, name, tensor)

    # -- phases ------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str, step: int = 0, micro_batch: int = 0, *, again: bool = False) -> Iterator[None]:
        """Within it, everything happens in phase `name` of `step` and `micro_batch`.

        With `again` it will be entered once more, and no owner is asked at its end: for what is short and frequent.
        """
        self.begins(step)
        before, module, told = self._log.where, self._log.module, self._phases.told
        self._phases.told = True
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
            self._log.module, self._phases.told = module, told  # where a backward ends is no module's

    def begins(self, step: int) -> None:
        """Step `step` begins: say so where a run lets go of anything before the first phase of it."""
        if self.steps is not None and step >= self.steps:
            self.enough()

    def enough(self) -> None:
        """From here on see no more than `"phases"` does, as from step `steps` on."""
        if self.exact:
            try:
                self._finish()
            except Exception as error:  # a mistake of ours must not stop the program
                self._log.missed("the account", error, "all")

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
            self._roster.walk()
        elif self.mode != "off":
            self._sum_owners()
        self._enter(before)

    def _sum_owners(self) -> None:
        """Append what owners hold at the end of this phase, unless it held as much when it last ended.

        What only a log sees is not measured.
        """
        totals, where = self._roster.totals(self.device), self._log.where
        if self._steady.get(where[1:]) != totals:
            self._steady[where[1:]] = totals
            end = torch.cuda.memory_allocated() if self.device == "cuda" else None
            self._account.phases.append(Phase(where, None, end, totals))

    # -- what was measured -------------------------------------------------------------------------------------

    def account(self) -> Account:
        """What was measured so far; while exact, up to this moment and without the allocator's side."""
        return so_far(self._log) if self.exact else self._account

    @property
    def events(self) -> list[Event]:
        """Every birth and death that was seen, and every phase's start, in order."""
        return self._log.events

    @property
    def gaps(self) -> list[Gap]:
        """What the block did that is not seen, or only in part, each by name: a warning of each ends the block."""
        return self._unseen.gaps()

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
            raise LookupError(self._without())
        return peak

    def _without(self) -> str:
        """Why there is no peak."""
        if self.mode != "exact":
            return f"mode={self.mode!r} measures no peak; mode='exact' does"
        failed = [gap.sentence for gap in self.gaps if gap.figures == "all"]
        return (
            *failed,
            "no peak was measured yet: run what is to be measured inside the ledger's with block",
        )[0]

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
    def saved(self) -> int | None:
        """The most bytes of activations that autograd kept for backward at once; None where nothing saw them."""
        seen = self.exact or self._account.peak is not None
        return most_saved(self._log.events) if seen and not self._unseen.lacks("saved") else None

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
        self._log.work.add(self._log.where, work)
        with self._instruments.hidden(), self._log.opaque(name):
            yield

    def _begin(self) -> None:
        self._log.restart()
        self._phases.restart()
        self._account, self._broke = nothing(), None
        self.exact = True
        self._log.look()
        self._log.follow = self._phases.follow
        self._log.settle = settle if self._settle else None
        others = [self._compiled.watching]
        self._allocator = None
        if self._with_allocator and not self._log.fakes:
            self._allocator = CudaAllocator() if self.device == "cuda" else CpuAllocator()
            if not self._allocator.start():
                self._unseen.note("profiler", "allocator", PROFILED)
            elif isinstance(self._allocator, CpuAllocator):
                others.append(partial(self._allocator.giving_way, self._unseen))
        try:
            self._roster.open()
            self._instruments.open(*others)
        except BaseException:
            self._stop()
            raise

    def _finish(self) -> None:
        try:
            self._roster.walk()
        finally:
            self._stop()

    def _stop(self) -> None:
        self._instruments.close()
        self.exact = False
        self._account = closed(self._log, self._allocator, self._kernel)
        unattributed = self._account.books.unattributed
        if unattributed and not self._unseen.lacks("storages"):
            self._unseen.note(
                "unattributed", "storages", f"{unattributed:,} bytes of the peak were {UNATTRIBUTED}"
            )


def _device_of(model: torch.nn.Module | None) -> str:
    parameter = None if model is None else next(model.parameters(), None)
    if parameter is not None:
        return parameter.device.type
    return "cuda" if torch.cuda.is_initialized() else "cpu"
