"""Blocks of a caching allocator, the pools of those that are free, and the device that they are reserved from."""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from enum import Enum
from typing import NamedTuple

PAGE = 2 * 1024**2
"""Bytes that an address is a multiple of."""

_ADDRESS_BITS = 60


class State(Enum):
    """What a block is. `WAITING`: freed, but a stream may still use it. `UNMAPPED`: addresses without memory."""

    FREE = 0
    ALLOCATED = 1
    WAITING = 2
    UNMAPPED = 3


class Trace(NamedTuple):
    """What the allocator did, by torch's name for it. Of `oom`, `address` is what the device has free, in bytes."""

    action: str
    address: int
    size: int
    stream: int
    key: Hashable = None


class AddressRange(NamedTuple):
    """Addresses that are reserved for an expandable segment, which maps them in pages of `page` bytes."""

    start: int
    size: int
    page: int


class Block:
    """A part of a segment. Neighbours in the segment are linked; `size` and `requested` are in bytes."""

    __slots__ = (
        *("address", "size", "stream", "pool", "range", "state", "before", "after"),
        *("key", "requested", "uses", "waits", "inserted"),
    )

    def __init__(
        self, address: int, size: int, stream: int, pool: "Pool", range_: AddressRange | None = None
    ) -> None:
        self.address, self.size, self.stream, self.pool, self.range = address, size, stream, pool, range_
        self.state = State.FREE
        self.before: Block | None = None
        self.after: Block | None = None
        self.key: Hashable = None
        self.requested = 0
        self.uses: set[int] | None = None  # other streams, while it is allocated
        self.waits = 0  # of its events
        self.inserted = 0  # count of the pool's searches then

    @property
    def split(self) -> bool:
        """Whether it is only a part of its segment."""
        return self.before is not None or self.after is not None

    @property
    def expandable_size(self) -> int:
        """What it could become by mapping the addresses behind it."""
        after = self.after
        return self.size + (after.size if after is not None and after.state is State.UNMAPPED else 0)

    def cut(self, size: int) -> "Block":
        """Keep the first `size` bytes and return the rest, a free block behind them, in no pool."""
        rest = Block(self.address + size, self.size - size, self.stream, self.pool, self.range)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def absorb(self, after: "Block") -> None:
        """Take in the block behind this one."""
        self.size += after.size
        self.after = after.after
        if after.after is not None:
            after.after.before = self

    def merged(self) -> "Block":
        """Merge it with neighbours of its state, which leave the pool. Returns the whole; put it into the pool."""
        block, before, after = self, self.before, self.after
        if before is not None and before.state is block.state:
            self.pool.remove(before)
            before.absorb(block)
            block = before
        if after is not None and after.state is block.state:
            self.pool.remove(after)
            block.absorb(after)
        return block


class Pool:
    """Blocks that nobody uses: those of up to 1 MiB if `small`, otherwise larger ones. Each stream has its own."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.searches = 0
        self.sorted: dict[int, list[int]] = {}  # of a stream: sizes and addresses, as one number, in order
        self.unmapped: dict[int, list[int]] = {}  # of a stream: addresses, in order
        self._blocks: dict[int, Block] = {}  # by address

    def insert(self, block: Block) -> None:
        """Add a free or an unmapped block."""
        if block.state is State.UNMAPPED:
            insort(self.unmapped.setdefault(block.stream, []), block.address)
        else:
            ordered = self.sorted.get(block.stream)
            if ordered is None:
                ordered = self.sorted[block.stream] = []
            insort(ordered, block.size << _ADDRESS_BITS | block.address)
            block.inserted = self.searches
        self._blocks[block.address] = block

    def remove(self, block: Block) -> None:
        """Take out a block that is in it."""
        if block.state is State.UNMAPPED:
            ordered, number = self.unmapped[block.stream], block.address
        else:
            ordered, number = self.sorted[block.stream], block.size << _ADDRESS_BITS | block.address
        del ordered[bisect_left(ordered, number)]
        del self._blocks[block.address]

    def at(self, ordered: list[int], index: int) -> Block:
        """The block of a number in `sorted`."""
        return self._blocks[ordered[index] & (1 << _ADDRESS_BITS) - 1]

    def from_size(self, stream: int, size: int) -> tuple[list[int], int]:
        """The stream's numbers, and the index of the first block with at least `size` bytes."""
        ordered = self.sorted.get(stream, [])
        return ordered, bisect_left(ordered, size << _ADDRESS_BITS)

    def free(self) -> list[Block]:
        """Every free block, by stream, size and address."""
        return [
            self.at(ordered, index)
            for _, ordered in sorted(self.sorted.items())
            for index in range(len(ordered))
        ]

    def address_space(self, stream: int) -> Iterator[Block]:
        """The unmapped blocks of `stream`, by address."""
        return (self._blocks[address] for address in self.unmapped.get(stream, ()))


class Device:
    """The memory of a card: what is reserved of it, in segments, and what is left. All in bytes."""

    def __init__(self, limit: int | None, capacity: int | None) -> None:
        self.limit, self.capacity = limit, capacity
        self.reserved = self.peak_reserved = 0
        self.segments: dict[int, Block] = {}  # the first block of each, by address
        self.trace: list[Trace] | None = None
        self._next_address = PAGE

    @property
    def free(self) -> int | None:
        """What can still be reserved. None: no limit is known."""
        return None if self.limit is None else self.limit - self.reserved

    def has(self, size: int) -> bool:
        return self.limit is None or self.reserved + size <= self.limit

    def addresses(self, size: int) -> int:
        """The first of `size` addresses that nothing has had before."""
        address = self._next_address
        self._next_address += -(-size // PAGE) * PAGE
        return address

    def reserve(self, size: int, action: str, block: Block) -> None:
        """Count `size` bytes as reserved, from where `block` begins."""
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.record(action, block.address, size, block.stream)

    def release(self, size: int, action: str, block: Block) -> None:
        """Count `size` bytes as given back."""
        self.reserved -= size
        self.record(action, block.address, size, block.stream)

    def record(self, action: str, address: int, size: int, stream: int, key: Hashable = None) -> None:
        if self.trace is not None:
            self.trace.append(Trace(action, address, size, stream, key))
