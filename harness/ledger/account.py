"""What a ledger measured, and how that follows from its log and from what the allocator's own events say."""

from typing import NamedTuple

from harness.ledger.allocator import CpuAllocator, CudaAllocator
from harness.ledger.events import Event
from harness.ledger.in_flight import Forwards, in_flight
from harness.ledger.log import Log
from harness.ledger.reconcile import Books, at_allocator_peak, reconciled
from harness.ledger.replay import Category, Peak, Phase, from_the_start, replay


class Account(NamedTuple):
    """What a ledger measured."""

    peak: Peak | None
    categories: dict[str, Category]
    phases: list[Phase]
    books: Books
    forwards: Forwards | None = None


def nothing() -> Account:
    """What a ledger has measured that has seen nothing."""
    return Account(None, {}, [], Books())


def so_far(log: Log) -> Account:
    """Up to this moment, without the allocator's side."""
    return _of(log, from_the_start(log.events, log.began), Books())


def closed(log: Log, allocator: CpuAllocator | CudaAllocator | None, kernel: bool) -> Account:
    """Of a log that has ended, whose events are then the whole story. The allocator is heard no more.

    With `kernel` the peak is the allocator's, else that of storages.
    """
    if isinstance(allocator, CpuAllocator) and (allocations := allocator.stop()) is not None:
        story = reconciled(log.events, log.operators, allocations, log.began)
        log.events = story.events
        peak, books = at_allocator_peak(story, allocator.source)
        return _of(log, story.events, books, peak if kernel else None)
    log.events = from_the_start(log.events, log.began)
    books = Books(allocator.source, allocator.highest()) if isinstance(allocator, CudaAllocator) else Books()
    return _of(log, log.events, books)


def _of(log: Log, events: list[Event], books: Books, highest: Peak | None = None) -> Account:
    peak, categories, phases = replay(events)
    peak = highest or peak
    for phase in phases:
        phase.work = log.work.of(phase.where)
    if not log.unseen.lacks("saved"):
        return Account(peak, categories, phases, books, in_flight(events))
    peak.saved = None
    for phase in phases:
        phase.saved = None
    return Account(peak, categories, phases, books)
