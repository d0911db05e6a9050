"""The log held against the allocator's own events: what its peak was made of, and what of it nobody explains."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from harness.ledger.allocator import Allocation
from harness.ledger.categories import CATEGORIES
from harness.ledger.events import Event, Operator, Storage, Where
from harness.ledger.holdings import holdings_of
from harness.ledger.replay import Peak, from_the_start

CLOCK_ERROR = 500
"""Nanoseconds by which the allocator's clock and the log's may disagree; far below the time between two operators."""

NUMBER = 16
"""Bytes of the largest 0-dim tensor that a Python number given to an operator becomes; no dispatch mode is shown it."""


WAITS = ("wait_tensor.default",)
"""Operators that wait for a collective."""


@dataclass
class Books:
    """The allocator's count at its own peak, and what of it no category explains. None: no allocator was heard."""

    source: str | None = None
    peak: int | None = None
    unattributed: int | None = None
    foreign: int | None = (
        None  # then alive, and in no figure here: a mapped file's, numpy's, or from before the log
    )


@dataclass(slots=True, eq=False)
class Block:
    """A block of the allocator's, and the storage found to live in it."""

    nbytes: int
    born: float
    died: float = math.inf
    pointer: int = 0
    storage: Storage | None = None


def blocks_of(allocations: Iterable[Allocation]) -> dict[int, list[Block]]:
    """Blocks by address, in order of birth. A block whose birth was not heard is left out."""
    blocks: dict[int, list[Block]] = {}
    for event in allocations:
        here = blocks.setdefault(event.pointer, [])
        if event.delta > 0:
            here.append(Block(event.delta, event.time, pointer=event.pointer))
        elif here and here[-1].died == math.inf:
            here[-1].died = event.time
    return blocks


def _born(block: Block) -> float:
    return block.born


def settle(storages: Iterable[Storage], blocks: dict[int, list[Block]]) -> list[Storage]:
    """Put each storage into the block it lives in; those that live in none are returned."""
    homeless = []
    for storage in storages:
        here = blocks.get(storage.pointer, [])
        index = bisect_right(here, storage.born + CLOCK_ERROR, key=_born) - 1  # type: ignore[arg-type]
        block = here[index] if index >= 0 else None
        if (
            block
            and block.storage is None
            and block.nbytes == storage.nbytes
            and block.died > storage.born - CLOCK_ERROR
        ):
            block.storage = storage
            if block.died == math.inf and storage.died is not None:  # freed by a thread that reports nothing
                block.died = storage.died
        else:
            homeless.append(storage)
    return homeless


def is_scratch(operators: Sequence[Operator], block: Block) -> bool:
    """Whether `block` came and went within one operator's turn: a kernel's scratch, or a number given to it.

    A turn lasts until the next operator begins, for a collective does its work while its caller waits; where its caller
    goes on and waits later, it keeps its scratch until then. A number may live on, for autograd keeps it.
    """
    if block.nbytes <= NUMBER:
        return True
    born, died = (_turn(operators, time) for time in (block.born + CLOCK_ERROR, block.died - CLOCK_ERROR))
    if born < 0 or block.died == math.inf:
        return False
    return died <= born or operators[died].name in WAITS


def _turn(operators: Sequence[Operator], time: float) -> int:
    """Which operator began last at `time`; -1 where none had."""
    return bisect_right(operators, time, key=lambda operator: operator.began) - 1


def without_mappings(
    blocks: list[Block], foreign: Sequence[Storage], operators: Sequence[Operator]
) -> list[Block]:
    """`blocks` without mapped files, which are reported as if allocated: storages of `foreign` lie within them."""
    nameless = [block for block in blocks if block.storage is None and not is_scratch(operators, block)]
    mappings = {
        id(block)
        for block in nameless
        for storage in foreign
        if block.pointer <= storage.pointer < block.pointer + block.nbytes and storage.nbytes < block.nbytes
        if block.born <= storage.born < block.died
    }
    return [block for block in blocks if id(block) not in mappings]


@dataclass(frozen=True)
class Reconciled:
    """The log's story, as the allocator's events complete it: which blocks there were, and what lived in each."""

    events: list[Event]
    operators: Sequence[Operator]
    blocks: list[Block]
    foreign: list[Storage]  # in memory of somebody else's


def reconciled(
    events: Sequence[Event], operators: Sequence[Operator], allocations: Iterable[Allocation], opened: int
) -> Reconciled:
    """`events` with what the log, which began when it was `opened`, met too late or not at all."""
    storages = [event.storage for event in events if event.storage is not None and event.delta > 0]
    by_pointer = blocks_of(allocations)
    homeless = settle(storages, by_pointer)
    homeless = [storage for storage in homeless if not (storage.base and _born_unseen(storage, by_pointer))]
    whole = from_the_start(events, opened)
    foreign = [storage for storage in homeless if not storage.base]
    blocks = without_mappings([block for here in by_pointer.values() for block in here], foreign, operators)
    left = left_behind(blocks, operators)
    blocks += [Block(s.nbytes, s.born, s.died or math.inf, storage=s) for s in homeless if s.base]
    return Reconciled(_with(whole, left), operators, blocks, foreign)


def _born_unseen(storage: Storage, blocks: dict[int, list[Block]]) -> bool:
    """Whether `storage`, which nobody saw being made, came within the log's time after all; it is put in its block."""
    for block in blocks.get(storage.pointer, []):
        if (
            block.storage is None
            and block.nbytes == storage.nbytes
            and block.born <= storage.born < block.died
        ):
            block.storage, storage.base = storage, False
            return True
    return False


def left_behind(blocks: Iterable[Block], operators: Sequence[Operator]) -> list[Storage]:
    """A storage for each nameless block that was made inside an operator nobody sees into, and outlived it."""
    opaque = [operator for operator in operators if operator.leaves]
    left = []
    for block in blocks if opaque else ():
        index = bisect_right(opaque, block.born + CLOCK_ERROR, key=lambda operator: operator.began) - 1
        if block.storage is None and index >= 0:
            by = opaque[index]
            outlived = block.died == math.inf or not is_scratch(operators, block)
            if outlived and block.born <= by.ended + CLOCK_ERROR:
                block.storage = Storage(
                    block.nbytes, block.pointer, int(block.born), by.where, by.module, by.name, by.leaves
                )
                block.storage.recomputed = by.recomputed
                block.storage.died = None if block.died == math.inf else int(block.died)
                left.append(block.storage)
    return left


def _with(whole: list[Event], left: Iterable[Storage]) -> list[Event]:
    """`whole`, with the events of `left` where they belong."""
    for storage in left:
        for time, delta in ((storage.born, storage.nbytes), (storage.died, -storage.nbytes)):
            if time is not None:
                index = bisect_right(whole, time, key=lambda event: event.time)
                where = whole[index - 1].where if index else storage.where
                whole.insert(index, Event(time, delta, storage, where, storage.module))
    return whole


def at_allocator_peak(story: Reconciled, source: str) -> tuple[Peak, Books]:
    """The allocator's own peak, made up of categories, `kernel` scratch, and what nobody explains."""
    blocks, operators = story.blocks, story.operators
    changes = sorted(_changes(blocks), key=lambda change: change[0])
    total, peak, moment = 0, 0, -math.inf
    for time, delta in changes:
        total += delta
        if total > peak:
            peak, moment = total, time

    def alive(thing: Block | Storage) -> bool:
        return thing.born <= moment and (thing.died is None or thing.died > moment)

    standing = [block for block in blocks if alive(block)]
    owned = [block.storage for block in standing if block.storage is not None]
    categories: dict[str, int | None] = {
        name: sum(storage.nbytes for storage in owned if storage.category == name) for name in CATEGORIES
    }
    nameless = [block for block in standing if block.storage is None]
    scratch = [block for block in nameless if is_scratch(operators, block)]
    kernel = categories["kernel"] = sum(block.nbytes for block in scratch)
    saved = sum(
        s.nbytes
        for s in owned
        if s.category == "activations" and s.saved_at is not None and s.saved_at <= moment
    )
    recomputed = sum(s.nbytes for s in owned if s.category == "activations" and s.recomputed)
    where, module, op = _place(operators, moment)
    unattributed = sum(block.nbytes for block in nameless) - kernel
    books = Books(
        source, peak, unattributed, sum(storage.nbytes for storage in story.foreign if alive(storage))
    )
    total_held = sum(held for held in categories.values() if held)
    return Peak(total_held, where, module, op, categories, saved, recomputed, holdings_of(owned)), books


def _changes(blocks: Iterable[Block]) -> Iterator[tuple[float, int]]:
    for block in blocks:
        yield block.born, block.nbytes
        if block.died != math.inf:
            yield block.died, -block.nbytes


def _place(operators: Sequence[Operator], moment: float) -> tuple[Where, str, str]:
    index = bisect_right(operators, moment + CLOCK_ERROR, key=lambda operator: operator.began) - 1
    if index < 0:
        return Where(0, "idle", 0), "", ""
    operator = operators[index]
    return operator.where, operator.module, operator.name
