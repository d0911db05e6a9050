"""Compares the log with the allocator's own events: what the allocator's peak consists of, and what is unexplained."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.ledger.allocator import Allocation
from harness.ledger.categories import CATEGORIES, KERNEL
from harness.ledger.events import Event, Operator, Storage, Where
from harness.ledger.holdings import holdings_of
from harness.ledger.replay import Peak, backdated

Libraries = Callable[[str, int], str]
"""From an operator, "" for a compiled program, and the bytes of a block that outlives it to the name of what a library
keeps. "" if it is none."""

SCALAR_BYTES = 16
"""Bytes of the largest 0-dim tensor that torch makes of a Python number in an operator's arguments. No dispatch mode
sees it."""


WAIT_OPERATORS = ("wait_tensor.default",)
"""Operators that wait for a collective."""


class Exhausted(NamedTuple):
    """The first allocation that the card had no room for."""

    where: Where
    module: str
    op: str
    nbytes: int
    """The bytes of that allocation."""


class Reservation(NamedTuple):
    """What a GPU's caching allocator reserved from the driver, in bytes, at the first moment when it was most.

    None: not known.
    """

    reserved: int
    """In segments."""
    slack: int | None = None
    """Of it, what was not allocated; on a GPU less than the most that was reserved by the most that was allocated."""
    split: int | None = None
    """Of the slack, what is free in segments that are partly in use; of expandable segments nothing, as in torch."""
    segments: int | None = None
    """How many; an expandable one counts once."""
    retries: int | None = None
    """How often, in all, the cache was emptied for want of memory."""
    settings: str | None = None
    """The PYTORCH_ALLOC_CONF that it holds for."""
    exhausted: Exhausted | None = None
    """None: everything fits, or the card's memory is not known."""


@dataclass
class Accounting:
    """The allocator's count at its own peak, and the part that no category explains, in bytes. None: not recorded."""

    source: str | None = None
    peak: int | None = None
    unattributed: int | None = None
    # externally owned bytes alive at the peak, in no figure here: of mapped files, numpy, or from before the log
    externally_owned: int | None = None
    reservation: Reservation | None = None
    outside: int | None = None  # what lies on a GPU outside torch


@dataclass(slots=True, eq=False)
class Block:
    """A block of the allocator, and the storage in it, if known."""

    nbytes: int
    born: float
    died: float = math.inf
    pointer: int = 0
    storage: Storage | None = None


def blocks_of(allocations: Iterable[Allocation]) -> dict[int, list[Block]]:
    """Blocks by address, in order of allocation. A block whose allocation was not recorded is left out."""
    blocks: dict[int, list[Block]] = {}
    for event in allocations:
        at_address = blocks.setdefault(event.pointer, [])
        if event.delta > 0:
            at_address.append(Block(event.delta, event.time, pointer=event.pointer))
        elif at_address and at_address[-1].died == math.inf:
            at_address[-1].died = event.time
    return blocks


@dataclass(frozen=True)
class Timeline:
    """The operators in order of time. An allocator's clock may be `clock_error` nanoseconds off the log's, far less
    than the time between two operators.
    """

    operators: Sequence[Operator]
    clock_error: int

    def index_at(self, time: float) -> int:
        """Index of the last operator that began by `time`. -1 if there is none."""
        return bisect_right(self.operators, time, key=lambda operator: operator.began) - 1


def _birth(block: Block) -> float:
    return block.born


def assign_blocks(
    storages: Iterable[Storage], blocks: dict[int, list[Block]], clock_error: int
) -> list[Storage]:
    """Assign each storage to its block, and return the storages without a block."""
    without_block = []
    for storage in storages:
        at_address = blocks.get(storage.pointer, [])
        index = bisect_right(at_address, storage.born + clock_error, key=_birth) - 1  # type: ignore[arg-type]
        block = at_address[index] if index >= 0 else None
        if (
            block
            and block.storage is None
            and block.nbytes == storage.nbytes
            and block.died > storage.born - clock_error
        ):
            block.storage = storage
            # a thread that reports no events may have freed the block
            if block.died == math.inf and storage.died is not None:
                block.died = storage.died
        else:
            without_block.append(storage)
    return without_block


def is_scratch(timeline: Timeline, block: Block) -> bool:
    """Whether `block` is allocated and freed within one operator's interval: a kernel's scratch, or a Python number.

    An interval lasts until the next operator begins, because a collective works while its caller waits. A caller that
    does not wait at once keeps the scratch until it waits later. A number may live longer, because autograd keeps it.
    """
    if block.nbytes <= SCALAR_BYTES:
        return True
    born = timeline.index_at(block.born + timeline.clock_error)
    if born < 0 or block.died == math.inf:
        return False
    died = timeline.index_at(block.died - timeline.clock_error)
    return died <= born or timeline.operators[died].name in WAIT_OPERATORS


def without_mappings(blocks: list[Block], external: Sequence[Storage], timeline: Timeline) -> list[Block]:
    """`blocks` without mapped files, which are reported like allocations: storages of `external` lie inside them."""
    unassigned = [block for block in blocks if block.storage is None and not is_scratch(timeline, block)]
    mappings = {
        id(block)
        for block in unassigned
        for storage in external
        if block.pointer <= storage.pointer < block.pointer + block.nbytes and storage.nbytes < block.nbytes
        if block.born <= storage.born < block.died
    }
    return [block for block in blocks if id(block) not in mappings]


@dataclass(frozen=True)
class Reconciled:
    """The log's events completed by the allocator's: all blocks, and the storage in each."""

    events: list[Event]
    timeline: Timeline
    blocks: list[Block]
    externally_owned: list[Storage]  # storages in externally owned memory


def reconciled(
    events: Sequence[Event],
    timeline: Timeline,
    allocations: Iterable[Allocation],
    opened: int,
    libraries: Libraries | None = None,
) -> Reconciled:
    """Complete `events` with storages that the log saw too late or not at all. The log began at `opened`."""
    storages = [event.storage for event in events if event.storage is not None and event.delta > 0]
    by_pointer = blocks_of(allocations)
    without_block = assign_blocks(storages, by_pointer, timeline.clock_error)
    without_block = [
        storage for storage in without_block if not (storage.base and _assign_late(storage, by_pointer))
    ]
    all_events = backdated(events, opened)
    external = [storage for storage in without_block if not storage.base]
    blocks = without_mappings(
        [block for at_address in by_pointer.values() for block in at_address], external, timeline
    )
    if libraries is not None:
        name_workspaces(blocks, timeline, libraries)
    outliving = outliving_storages(blocks, timeline)
    blocks += [Block(s.nbytes, s.born, s.died or math.inf, storage=s) for s in without_block if s.base]
    return Reconciled(_with_events_of(all_events, outliving), timeline, blocks, external)


def _assign_late(storage: Storage, blocks: dict[int, list[Block]]) -> bool:
    """Whether `storage`, whose allocation no operator showed, was allocated during the log. If so, assign its block."""
    for block in blocks.get(storage.pointer, []):
        if (
            block.storage is None
            and block.nbytes == storage.nbytes
            and block.born <= storage.born < block.died
        ):
            block.storage, storage.base = storage, False
            return True
    return False


def name_workspaces(blocks: Iterable[Block], timeline: Timeline, libraries: Libraries) -> None:
    """Give each unassigned block that outlives its operator, and that a library keeps, a storage of its name."""
    for block in blocks:
        if block.storage is None and not is_scratch(timeline, block):
            index = timeline.index_at(block.born + timeline.clock_error)
            if index >= 0:
                maker = timeline.operators[index]
                name = libraries("" if maker.leaves else maker.name.partition(".")[0], block.nbytes)
                if name:
                    block.storage = _storage_in(block, maker, KERNEL, name)


def outliving_storages(blocks: Iterable[Block], timeline: Timeline) -> list[Storage]:
    """A storage for each unassigned block that was allocated inside an opaque operator and outlived it."""
    error = timeline.clock_error
    opaque = Timeline([operator for operator in timeline.operators if operator.leaves], error)
    storages = []
    for block in blocks if opaque.operators else ():
        index = opaque.index_at(block.born + error)
        if block.storage is None and index >= 0:
            maker = opaque.operators[index]
            outlived = block.died == math.inf or not is_scratch(timeline, block)
            if outlived and block.born <= maker.ended + error:
                block.storage = _storage_in(block, maker, maker.leaves)
                storages.append(block.storage)
    return storages


def _storage_in(block: Block, maker: Operator, category: str, name: str = "") -> Storage:
    """The storage in `block`, which `maker` allocated and the log did not see."""
    return Storage(
        block.nbytes,
        block.pointer,
        int(block.born),
        maker.where,
        maker.module,
        maker.name,
        category,
        name,
        None if block.died == math.inf else int(block.died),
        recomputed=maker.recomputed,
    )


def _with_events_of(events: list[Event], storages: Iterable[Storage]) -> list[Event]:
    """Insert the events of `storages` into `events`, in order of time."""
    for storage in storages:
        for time, delta in ((storage.born, storage.nbytes), (storage.died, -storage.nbytes)):
            if time is not None:
                index = bisect_right(events, time, key=lambda event: event.time)
                where = events[index - 1].where if index else storage.where
                events.insert(index, Event(time, delta, storage, where, storage.module))
    return events


def at_allocator_peak(reconciliation: Reconciled, source: str) -> tuple[Peak, Accounting]:
    """The allocator's own peak: categories, `kernel` scratch, and what is unexplained."""
    blocks, timeline = reconciliation.blocks, reconciliation.timeline
    size_changes = sorted(_size_changes(blocks), key=lambda change: change[0])
    total, peak, moment = 0, 0, -math.inf
    for time, delta in size_changes:
        total += delta
        if total > peak:
            peak, moment = total, time

    def alive(item: Block | Storage) -> bool:
        return item.born <= moment and (item.died is None or item.died > moment)

    alive_blocks = [block for block in blocks if alive(block)]
    storages = [block.storage for block in alive_blocks if block.storage is not None]
    categories: dict[str, int | None] = {
        name: sum(storage.nbytes for storage in storages if storage.category == name)
        for name in (*CATEGORIES, KERNEL)
    }
    unassigned = [block for block in alive_blocks if block.storage is None]
    scratch = sum(block.nbytes for block in unassigned if is_scratch(timeline, block))
    categories[KERNEL] = (categories[KERNEL] or 0) + scratch
    saved = sum(
        s.nbytes
        for s in storages
        if s.category == "activations" and s.saved_at is not None and s.saved_at <= moment
    )
    recomputed = sum(s.nbytes for s in storages if s.category == "activations" and s.recomputed)
    where, module, op = _place_at(timeline, moment)
    unattributed = sum(block.nbytes for block in unassigned) - scratch
    accounting = Accounting(
        source,
        peak,
        unattributed,
        sum(storage.nbytes for storage in reconciliation.externally_owned if alive(storage)),
    )
    attributed = sum(nbytes for nbytes in categories.values() if nbytes)
    return Peak(
        attributed, where, module, op, categories, saved, recomputed, holdings_of(storages)
    ), accounting


def _size_changes(blocks: Iterable[Block]) -> Iterator[tuple[float, int]]:
    for block in blocks:
        yield block.born, block.nbytes
        if block.died != math.inf:
            yield block.died, -block.nbytes


def _place_at(timeline: Timeline, moment: float) -> tuple[Where, str, str]:
    index = timeline.index_at(moment + timeline.clock_error)
    if index < 0:
        return Where(0, "idle", 0), "", ""
    operator = timeline.operators[index]
    return operator.where, operator.module, operator.name
