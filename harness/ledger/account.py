"""The result of a ledger: computed from its log and, where available, from the allocator's own events."""

from typing import NamedTuple

from harness.ledger.allocator import CpuAllocator, CudaAllocator
from harness.ledger.events import Event
from harness.ledger.in_flight import Forwards, in_flight
from harness.ledger.log import Log
from harness.ledger.reconcile import Accounting, at_allocator_peak, reconciled
from harness.ledger.replay import Category, Peak, Phase, backdated, replay


class Account(NamedTuple):
    """What a ledger measured."""

    peak: Peak | None
    categories: dict[str, Category]
    phases: list[Phase]
    accounting: Accounting
    forwards: Forwards | None = None


def empty_account() -> Account:
    """The account of a ledger that has seen nothing."""
    return Account(None, {}, [], Accounting())


def current_account(log: Log) -> Account:
    """The account up to this moment, without the allocator's data."""
    return _of(log, backdated(log.events, log.began), Accounting())


def final_account(log: Log, allocator: CpuAllocator | CudaAllocator | None, kernel: bool) -> Account:
    """The account of a log that has ended, whose events are complete. This stops the allocator's recording.

    With `kernel` the peak is the allocator's, otherwise that of storages.
    """
    if isinstance(allocator, CpuAllocator) and (allocations := allocator.stop()) is not None:
        reconciliation = reconciled(log.events, log.operators, allocations, log.began)
        log.events = reconciliation.events
        peak, accounting = at_allocator_peak(reconciliation, allocator.source)
        return _of(log, reconciliation.events, accounting, peak if kernel else None)
    log.events = backdated(log.events, log.began)
    accounting = (
        Accounting(allocator.source, allocator.highest())
        if isinstance(allocator, CudaAllocator)
        else Accounting()
    )
    return _of(log, log.events, accounting)


def _of(log: Log, events: list[Event], accounting: Accounting, allocator_peak: Peak | None = None) -> Account:
    peak, categories, phases = replay(events, log.kernels is not None)
    peak = allocator_peak or peak
    for phase in phases:
        phase.work = log.work.of(phase.where)
    if not log.unseen.lacks("saved"):
        return Account(peak, categories, phases, accounting, in_flight(events))
    peak.saved = None
    for phase in phases:
        phase.saved = None
    return Account(peak, categories, phases, accounting)
