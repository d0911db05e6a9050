"""The ledger of a card that is rehearsed, and beside it the ledger of its host."""

from pathlib import Path
from typing import Any, Self

from harness.device.snapshot import write
from harness.ledger import Ledger
from harness.ledger.account import Account
from harness.ledger.cuda_allocator import BLOCK
from harness.ledger.reconcile import Exhausted
from harness.rehearsal.card import CARD
from harness.rehearsal.card_kernels import CardKernels
from harness.rehearsal.card_memory import CardMemory

UNCOMPILED = "nothing is compiled in a rehearsal: the figures are those of the program without torch.compile"


class CardLedger(Ledger):
    """A ledger of the card with this `memory`. `host` is the ledger of its host."""

    def __init__(self, memory: CardMemory, **options: Any) -> None:
        super().__init__(device=str(CARD), allocator=False, block=BLOCK, **options)
        self.memory, self.host = memory, Ledger(device="cpu", allocator=False, **options)
        self._log.kernels = CardKernels(memory)
        memory.events, memory.storage_of = lambda: self._log.events, self._log.alive

    def __enter__(self) -> Self:
        self.host.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self.host.__exit__(*exc)

    def begins(self, step: int) -> None:
        """As `Ledger.begins`."""
        super().begins(step)
        if self.exact:
            self.memory.begins(step)

    def enough(self) -> None:
        """From now on see only what `"phases"` sees."""
        self.memory.catch_up()
        if names := ", ".join(self.memory.unknown):
            sentence = f"not known and in no figure: what kernels of {names} take beside their results"
            self._unseen.note("scratch", "kernel", sentence)
        if self.memory.uncompiled:
            self._unseen.note("torch.compile", "all", UNCOMPILED)
        super().enough()

    def account(self) -> Account:
        """What was seen so far, with what the card's allocator allocated and reserved."""
        account = super().account()
        if account.peak is not None:
            account.peak.allocated = self.memory.peak_allocated
            account.peak.reserved = self.memory.peak_reserved
            account.accounting.reservation = self.memory.reservation()
        return account

    def snapshot(self, file: str | Path) -> None:
        """Write the allocator's history so far to `file`, for https://pytorch.org/memory_viz. Raises OSError."""
        write(Path(file), self.memory.snapshot())

    @property
    def exhausted(self) -> Exhausted | None:
        """The first allocation that the card has no room for. None: all fits, or its memory is not known."""
        self.memory.catch_up()
        return self.memory.exhausted

    @property
    def fits(self) -> bool | None:
        """Whether everything fits into the card. None: its memory is not known."""
        return None if self.memory.capacity is None else self.exhausted is None
