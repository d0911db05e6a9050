"""The result of a ledger: computed from its log and, where available, from the allocator's own events."""

from typing import NamedTuple

from harness.ledger.allocator import CpuAllocator
from harness.ledger.cuda_allocator import CudaAllocator
from harness.ledger.events import Event
from harness.ledger.in_flight import Forwards, in_flight
from harness.ledger.log import Log
from harness.ledger.reconcile import (
    Accounting,
    Libraries,
    Reservation,
    Timeline,
    at_allocator_peak,
    reconciled,
)
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


def final_account(
    log: Log,
    allocator: CpuAllocator | CudaAllocator | None,
    kernel: bool,
    libraries: Libraries | None = None,
) -> Account:
    """The account of a log that has ended, whose events are complete. This stops the allocator's recording.

    With `kernel` the peak is the allocator's, otherwise that of storages. `libraries` names what libraries keep.
    """
    allocations = None if allocator is None else allocator.stop()
    peak, accounting = None, Accounting()
    if allocator is not None and allocations is not None:
        timeline = Timeline(log.operators, allocator.clock_error)
        reconciliation = reconciled(log.events, timeline, allocations, log.began, libraries)
        log.events = reconciliation.events
        peak, accounting = at_allocator_peak(reconciliation, allocator.source)
    else:
        log.events = backdated(log.events, log.began)
    account = _of(log, log.events, accounting, peak if kernel else None)
    if isinstance(allocator, CudaAllocator):
        _add_statistics(account, allocator)
    return account


def _add_statistics(account: Account, allocator: CudaAllocator) -> None:
    """Add what the statistics of CUDA's allocator say."""
    accounting, allocated, reserved = account.accounting, allocator.allocated(), allocator.reserved()
    accounting.source = allocator.source
    if accounting.peak is None:
        accounting.peak = allocated
    accounting.outside = allocator.outside()
    if reserved is not None:
        slack = None if allocated is None else reserved - allocated
        accounting.reservation = Reservation(reserved, slack)
    if account.peak is not None:
        account.peak.allocated, account.peak.reserved = allocated, reserved


def _of(log: Log, events: list[Event], accounting: Accounting, allocator_peak: Peak | None = None) -> Account:
    peak, categories, phases = replay(events, log.kernels is not None)
    peak = allocator_peak or peak
    for phase in phases:
        phase.work = log.work.of(phase.where)
    if log.recomputes_unseen:
        if peak is not None:
            peak.recomputed = None
        for phase in phases:
            phase.recomputed = None
    if not log.unseen.lacks("saved"):
        return Account(peak, categories, phases, accounting, in_flight(events))
    peak.saved = None
    for phase in phases:
        phase.saved = None
    return Account(peak, categories, phases, accounting)
