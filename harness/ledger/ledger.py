"""`Ledger`: takes owners and phases, and returns peaks and the comparison with the allocator."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Self

import torch

from harness.ledger.account import Account, current_account, empty_account, final_account
from harness.ledger.allocator import CpuAllocator
from harness.ledger.categories import CATEGORIES
from harness.ledger.collectives import settle
from harness.ledger.compiled import Compiled
from harness.ledger.cuda_allocator import BLOCK, CudaAllocator
from harness.ledger.events import Event, Where
from harness.ledger.in_flight import Forwards, most_saved
from harness.ledger.instruments import Instruments
from harness.ledger.log import Log
from harness.ledger.modules import Modules
from harness.ledger.on_host import OnHost
from harness.ledger.patch import DoesNotFit
from harness.ledger.patch_table import import_owners
from harness.ledger.phases import Phases
from harness.ledger.process_groups import ProcessGroups, sends_unseen
from harness.ledger.recent import Recent
from harness.ledger.reconcile import Accounting, Libraries
from harness.ledger.replay import Category, Peak, Phase
from harness.ledger.roster import Roster
from harness.ledger.timer import Times
from harness.ledger.traffic import Traffic
from harness.ledger.unseen import Gap, Unseen
from harness.ledger.work import Work
from harness.ledger.zero_parameters import ZeroParameters

import_owners()

MODES = ("exact", "phases", "off")

UNATTRIBUTED = (
    "allocated by no operator that the ledger saw: by code that disables torch's dispatch modes, as tracing for a "
    "compiler does, or that allocates directly"
)


class Ledger:
    """Accounts for memory inside its `with` block, in this thread.

    `mode="exact"` sees every tensor; `"phases"` sums what owners hold at the end of each phase; `"off"` does
    nothing. With `steps`, an exact ledger continues as `"phases"` from that step on. Pass owners here, or with `own`
    when they exist. Without `phase` the phases are inferred from the loop: a forward, its backward, the optimizer's
    step.

    `settle_collectives=True` makes the order of frees after collectives repeatable (`collectives.settle`). Then
    every rank must have such a ledger, because this is itself a collective.

    `allocator=False` compares with no allocator: fake tensors allocate nothing. `"statistics"` records no history of
    CUDA's allocator, and reads its statistics alone. `block` rounds each storage up to a multiple of so many bytes, as
    an allocator does; by default 512 on a GPU. `kernel=False` leaves scratch inside kernels to `allocator`: the peak is
    then that of storages. `libraries` names what an operator's library keeps, of which torch has no tensor.

    With `discover`, modules called from outside all other modules and optimizers that step become owners
    automatically, for as long as they live. With `lines`, each storage has the source line that allocated it.

    It accounts for one kind of device, "cpu" or "cuda": `device`, else the model's, else the GPU if it is in use.

    Raises ValueError for an unknown mode. A tensor from before the block counts if an owner names it.
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
        allocator: bool | Literal["statistics"] = True,
        kernel: bool = True,
        block: int | None = None,
        libraries: Libraries | None = None,
        discover: bool = False,
        lines: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: a ledger is one of {', '.join(MODES)}")
        self.mode, self.steps = mode, steps
        self.exact = False  # whether every tensor is seen now
        self.device = device or _device_of(model)
        self._settle, self._with_allocator, self._kernel = settle_collectives, allocator, kernel
        self._libraries = libraries
        self._unseen = Unseen()
        if block is None:
            block = BLOCK if self.device == "cuda" else 1
        self._log = Log(self.device, block, lines, self._unseen)
        self.recent = Recent(self._log)
        self.traffic = Traffic(self._log)
        self.on_host = OnHost(self._log)
        self._groups = ProcessGroups(self.traffic, self._log.report_failure)
        self._watching = ExitStack()  # what counts without a log
        self._times = Times(self.device == "cuda")
        self._modules = Modules(self._log)
        self._roster = Roster(self._log, self._modules, discover)
        self._phases = Phases(self._log, self._roster)
        self._modules.on_enter, self._modules.on_exit = self._phases.forward_begins, self._phases.forward_ends
        self._instruments = Instruments(self._log, self._modules, self._roster, self._phases)
        self._compiled = Compiled(
            self._log, self._modules, self._roster, self._phases, self._instruments.hidden
        )
        self._allocator: CpuAllocator | CudaAllocator | None = None
        self._depth = 0
        self._failed_in: Where | None = None
        self.on_phase: Callable[[Where], object] | None = None  # called when a phase with a name begins
        # in phases mode: the bytes by category that owners held when each phase last ended
        self._last_totals: dict[tuple[str, int], dict[str, int | None]] = {}
        self._account = empty_account()
        self.own(model=model, optimizer=optimizer, engine=engine, cache=cache)

    def __enter__(self) -> Self:
        if not self._depth:
            if self.mode == "exact":
                self._begin()
            elif self.mode == "phases":
                self._watch()
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._watching.close()
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
        """Add owners. They name their storages now and at the end of every phase; an engine also names its optimizer's.

        Storages that they held before the block count from its beginning, whenever the owner is added.
        """
        if self.mode != "off":
            self._roster.own(model, optimizer, engine, cache)
            if engine is not None:
                self.traffic.shares = ZeroParameters(engine).shares
            for module in (model, getattr(engine, "module", None)):
                if isinstance(module, torch.nn.Module):
                    self._note_senders(module)

    def disown(self, owner: Any) -> None:
        """Remove `owner`. What it named keeps its name."""
        self._roster.disown(owner)
        if owner is self._roster.engine:
            self.traffic.shares = None

    def claim(self, category: str, name: str, tensor: torch.Tensor) -> None:
        """Set the category of `tensor`'s storage. Raises ValueError for an unknown category."""
        if category not in CATEGORIES:
            raise ValueError(f"category={category!r}: a storage is one of {', '.join(CATEGORIES)}")
        self._roster.claim(category, str(name), tensor)

    # -- phases ------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str, step: int = 0, micro_batch: int = 0, *, again: bool = False) -> Iterator[None]:
        """Inside this context everything belongs to phase `name` of `step` and `micro_batch`.

        With `again` the same phase is entered once more later, and owners are not asked at its end: for short and
        frequent phases.
        """
        name, step, micro_batch = str(name), int(step), int(micro_batch)  # numpy's numbers too
        self.begins(step)
        before, module, explicit = self._log.where, self._log.module, self._phases.explicit
        self._phases.explicit = True
        where = Where(step, name, micro_batch)
        self._enter(where)
        if self.on_phase is not None:
            self.on_phase(where)
        began = None if self.exact else self._times.moment()
        try:
            yield
        except BaseException:
            self._failed_in = self._failed_in or self._log.where
            raise
        finally:
            if began is not None:
                self._times.add(where, began)
            if again:
                self._enter(before)
            else:
                self._leave(before)
            # restore the module, because the end of a backward belongs to no module
            self._log.module, self._phases.explicit = module, explicit

    def begins(self, step: int) -> None:
        """Step `step` begins. Call this where a run frees something before the first phase of the step."""
        if self.steps is not None and step >= self.steps:
            self.enough()

    def enough(self) -> None:
        """From now on see only what `"phases"` sees, as from step `steps` on."""
        if self.exact:
            try:
                self._finish()
            except Exception as error:  # an error of the ledger must not stop the program
                self._log.report_failure("the account", error, "all")
            if self._depth and self.device == "cpu" and not any(map(sends_unseen, self._roster.models)):
                self._watch()  # else the traffic ends here: it would be a part of it

    @property
    def where(self) -> Where:
        """The phase that is running now, or the phase that the first error left."""
        return self._failed_in or self._log.where

    @property
    def module(self) -> str:
        """The module that is running now, by its name. Empty: none, or it is not seen."""
        return self._log.module

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
            self._groups.look()
            self.traffic.ended(self._log.where)
        self._enter(before)

    def _sum_owners(self) -> None:
        """Append what owners hold at the end of this phase, unless it is the same as when the phase last ended.

        Categories that only a log sees are not measured.
        """
        totals, where = self._roster.totals(self.device), self._log.where
        self.recent.phase_ended(totals)
        if self._last_totals.get(where[1:]) != totals:
            self._last_totals[where[1:]] = totals
            allocated = torch.cuda.memory_allocated() if self.device == "cuda" else None
            self._account.phases.append(Phase(where, None, allocated, totals))

    # -- what was measured -------------------------------------------------------------------------------------

    def account(self) -> Account:
        """What was measured so far. While exact: up to this moment, without the allocator's data."""
        return current_account(self._log) if self.exact else self._account

    @property
    def events(self) -> list[Event]:
        """Every allocation, every free and every start of a phase that was seen, in order."""
        return self._log.events

    @property
    def gaps(self) -> list[Gap]:
        """What the block did that the ledger does not see or sees only in part. At its end it warns of each."""
        self._groups.look()
        return self._unseen.gaps()

    # -- work and time -----------------------------------------------------------------------------------------

    def work(self) -> dict[Where, Work]:
        """The work done so far, by where. Empty while work is not counted."""
        return self._log.work.all() if self.exact else {}

    def fill_in(self, where: Where, work: Work | None) -> None:
        """Add `work` to `where`, for work that the log did not see. None: the amount is unknown."""
        self._log.work.add(where, work)

    def seconds(self) -> dict[str, dict[int, float]]:
        """Seconds of each phase by step, summed over micro-batches, from the unslowed steps. Waits for the device."""
        return self._times.by_phase()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside this context nothing counts as work or traffic: for operations that a normal run would not do."""
        with self._log.work.off(), self.traffic.uncounted():
            yield

    @property
    def last_peak(self) -> Peak | None:
        """The peak of the last exact measurement. None while it is still running."""
        return self._account.peak

    def highest(self) -> int | None:
        """The most bytes so far, of a GPU's allocator or as far as was measured exactly. None: nothing was measured."""
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        self.recent.look()
        peak = None if self._account.peak is None else self._account.peak.bytes
        return max((each for each in (peak, self.recent.highest) if each is not None), default=None)

    @property
    def peak(self) -> Peak:
        """The moment with the most bytes. Raises LookupError if nothing was measured exactly."""
        peak = self.account().peak
        if peak is None:
            raise LookupError(self._missing_peak_reason())
        return peak

    def _missing_peak_reason(self) -> str:
        """The reason why there is no peak."""
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
        """The most forwards that waited for their backward at once. None if nothing was measured exactly."""
        return self.account().forwards

    @property
    def saved(self) -> int | None:
        """The most activation bytes that autograd kept for backward at once. None if this was not seen."""
        measured = self.exact or self._account.peak is not None
        return most_saved(self._log.events) if measured and not self._unseen.lacks("saved") else None

    @property
    def allocator(self) -> Accounting:
        """The allocator's own peak, and the part of it that is unattributed."""
        return self.account().accounting

    @contextmanager
    def opaque(self, name: str, work: Work | None = None) -> Iterator[None]:
        """Inside this context only the allocator sees memory: a compiled program shows no operators and takes no hooks.

        Memory allocated and freed inside is `kernel`, like an operator's scratch. Memory that remains is named by
        owners, or when an operator uses it. It counts as `work`, if its caller knows the amount.
        """
        if not self.exact:
            yield
            return
        self._log.work.add(self._log.where, work)
        with self._instruments.hidden(), self._log.opaque(name):
            yield

    def _watch(self) -> None:
        """Count what ranks send without a log."""
        try:
            self._watching.enter_context(self._groups.watching())
        except DoesNotFit as error:
            self._unseen.leave_out(error, "traffic", "what ranks send each other is not counted")
        if self.device != "cpu":
            sentence = "copies between host and device are not in the traffic: only an exact ledger sees them"
            self._unseen.note("copies", "traffic", sentence)

    def _note_senders(self, model: torch.nn.Module) -> None:
        """Note what `model` sends that only a log sees."""
        if self.mode == "phases" and (senders := sends_unseen(model)):
            sentence = f"what {senders} sends is not in the traffic: only an exact ledger sees it"
            self._unseen.note(senders, "traffic", sentence)

    def _begin(self) -> None:
        self._log.restart()
        self.traffic.restart()
        self.recent.restart()
        self._phases.restart()
        self._account, self._failed_in = empty_account(), None
        self.exact = True
        self._log.look()
        self._log.follow = self._phases.follow
        self._log.settle = settle if self._settle else None
        self._log.transferred = self._groups.operator
        self._log.copied = self.traffic.copied if self.device != "cpu" else None
        watchers = [self._compiled.watching]
        self._allocator = None
        if self._with_allocator and not self._log.fakes:
            self._allocator = self._new_allocator()
            if self._allocator.start():
                watchers.append(self._allocator.giving_way)
        try:
            self._roster.open()
            self._instruments.open(*watchers)
        except DoesNotFit as error:
            self._give_up(error)
        except BaseException:
            self._stop()
            raise

    def _new_allocator(self) -> CpuAllocator | CudaAllocator:
        if self.device == "cuda":
            return CudaAllocator(self._unseen, history=self._with_allocator != "statistics")
        return CpuAllocator(self._unseen)

    def _give_up(self, error: DoesNotFit) -> None:
        """Measure nothing exactly, because a compiler would meet the instruments."""
        self._instruments.close()
        if self._allocator is not None:
            self._allocator.stop()
        self.exact = False
        self._unseen.leave_out(
            error, "all", "nothing is measured exactly, because a compiler would see the ledger"
        )

    def _finish(self) -> None:
        try:
            self._roster.walk()
        finally:
            self._stop()

    def _stop(self) -> None:
        self._instruments.close()
        self.exact = False
        self._account = final_account(self._log, self._allocator, self._kernel, self._libraries)
        unattributed = self._account.accounting.unattributed
        if unattributed and not self._unseen.lacks("storages"):
            self._unseen.note(
                "unattributed", "storages", f"{unattributed:,} bytes of the peak were {UNATTRIBUTED}"
            )


def _device_of(model: torch.nn.Module | None) -> str:
    parameter = None if model is None else next(model.parameters(), None)
    if parameter is not None:
        return parameter.device.type
    return "cuda" if torch.cuda.is_initialized() else "cpu"
