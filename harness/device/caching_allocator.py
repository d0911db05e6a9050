"""A twin of PyTorch's CUDA caching allocator, its native backend: what births and deaths of blocks reserve.

Read, in `c10/cuda/CUDACachingAllocator.cpp`: the main branch of late 2025, about torch 2.10, which is the source of
every rule here; commit 001074d25084 of 2024, to see what changed since; and the headers of torch 2.13.0. It was never
compared with a GPU: what it says is unverified.

- A request is rounded to 512 B, or as `roundup_power2_divisions` says. Up to 1 MiB it comes from the small pool, whose
  segments have 2 MiB. Above, and below 10 MiB, a segment has 20 MiB; from 10 MiB on, the request's multiple of 2 MiB.
- The smallest free block of the same stream and pool that is large enough is taken; of equal ones, the lowest address.
- The rest of it becomes a block if it has 512 B (small pool, expandable segments), otherwise if it has more than 1 MiB.
- A freed block merges with free neighbours at once. One that other streams used waits for them first.
- Where the card has no room: free enough large blocks, if `max_split_size_mb` is set; then all segments that nothing
  uses; then out of memory.

What is not known without the card:

- Addresses. Here a new segment lies above all earlier ones, and no address is used twice. Their order matters only
  between free blocks of equal size; within an expandable segment it is known.
- When a stream gets there. A block that `record_stream` marked waits until `synchronize` says so, or until memory is
  short. On a card it may be free earlier, so that less is reserved.
- What the driver rounds. Only `large_segment_size_mb` makes segments that are no multiple of 2 MiB.

Not modelled: the private pools of CUDA graphs and of `torch.cuda.MemPool`. `throw_on_cudamalloc_oom` is newer than the
source that was read, and is taken to change nothing but the moment of the error.

In 2024's source, a block that is never split may exceed its request by 20 MiB, whatever the settings; garbage
collection also runs where the memory fraction was set to 1.
"""

import sys
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import replace

from harness.device.allocator_settings import INTERVALS, MIB, Settings
from harness.device.blocks import Block, Device, Pool, State
from harness.device.expandable_segments import allocate, unmap
from harness.tables import size as shown

SMALLEST = 512
"""Every size is rounded up to a multiple of this."""

SMALL = MIB
"""The largest request of the small pool."""

SMALL_SEGMENT = 2 * MIB
"""What the small pool reserves at a time."""

OWN_SEGMENT = 10 * MIB
"""From this size on, a request gets a segment of its own size."""

ROUND_SEGMENT = 2 * MIB
"""What the size of such a segment is a multiple of."""


class OutOfMemory(Exception):
    """No room for a request. All in bytes: `nbytes` was requested and `segment` tried for it.

    `free` is left on the card (None: no limit is known), of `limit`. `allowed` is what the memory fraction allows, None
    without one.
    """

    def __init__(
        self, nbytes: int, segment: int, device: Device, allowed: int | None, allocated: int
    ) -> None:
        self.nbytes, self.segment = nbytes, segment
        self.limit, self.free, self.allowed = device.limit, device.free, allowed
        self.allocated, self.reserved = allocated, device.reserved
        allows = f"; the memory fraction allows {shown(allowed)}" if allowed is not None else ""
        super().__init__(
            f"CUDA out of memory: tried to allocate {shown(segment)} where {shown(self.free)} of {shown(self.limit)} "
            f"is free{allows}; PyTorch has allocated {shown(allocated)}, and {shown(self.unallocated)} is reserved by "
            "it but unallocated"
        )

    @property
    def unallocated(self) -> int:
        """Bytes that are reserved and not allocated."""
        return self.reserved - self.allocated


class CachingAllocator:
    """One process's allocator on one card. Sizes in bytes.

    `limit` is what the card has for PyTorch, after all that others keep in it; None: without end. `capacity` is the
    card's whole memory, of which a memory fraction is a share; None: it is `limit`. Raises ValueError where a fraction
    has neither.
    """

    def __init__(
        self, settings: Settings | None = None, limit: int | None = None, capacity: int | None = None
    ) -> None:
        self.settings = settings = settings or Settings()
        self.device = Device(limit, capacity or limit)
        self.allocated = self.peak_allocated = 0
        self.active = 0
        """Allocated, or waiting for another stream."""
        self.requested = 0
        """What was requested, before rounding, of all that is active."""
        self.inactive_split = 0
        """In free blocks whose segment is partly in use. Expandable segments are left out, as in torch."""
        self.retries = self.ooms = 0
        self._small, self._large = Pool(True), Pool(False)
        self._blocks: dict[Hashable, Block | None] = {}
        self._waiting: dict[int, deque[Block]] = {}
        self._done: deque[Block] = deque()
        self._max_split = settings.max_split_size or sys.maxsize
        self._rounds = any(steps > 1 for steps in settings.roundup_power2_divisions)
        self._allowed = self._allowance()

    def _allowance(self) -> int | None:
        """What the memory fraction allows to reserve. None: it is 1."""
        fraction = self.settings.per_process_memory_fraction
        if fraction == 1:
            return None
        if self.device.capacity is None:
            raise ValueError(
                f"per_process_memory_fraction:{fraction}: it is a share of the card's memory; give that"
            )
        return int(fraction * self.device.capacity)

    @property
    def reserved(self) -> int:
        return self.device.reserved

    @property
    def peak_reserved(self) -> int:
        return self.device.peak_reserved

    @property
    def segments(self) -> int:
        """How many there are now; an expandable one counts once, however much of it is mapped."""
        return len(self.device.segments)

    def malloc(self, key: Hashable, nbytes: int, stream: int = 0) -> None:
        """Allocate `nbytes` for `stream`, under a `key` that nothing else has. Raises OutOfMemory.

        0 bytes need no block, as in torch.
        """
        assert key not in self._blocks, key
        if self._done:
            self._process_events()
        if not nbytes:
            self._blocks[key] = None
            return
        size = self.rounded(nbytes)
        pool = self._small if size <= SMALL else self._large
        block = self._best_fit(pool, stream, size) or self._new_block(pool, stream, size, nbytes, key)
        self._take(block, size)
        block.state, block.key, block.requested = State.ALLOCATED, key, nbytes
        self._blocks[key] = block
        size = block.size
        self.allocated += size
        self.active += size
        self.requested += nbytes
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        if self.device.trace is not None:
            self.device.record("alloc", block.address, nbytes, stream, key)

    def free(self, key: Hashable) -> None:
        """Free what `key` has. Raises KeyError where it has nothing."""
        block = self._blocks.pop(key)
        if block is None:
            return
        self.allocated -= block.size
        if self.device.trace is not None:
            self.device.record("free_requested", block.address, block.requested, block.stream, key)
        if block.uses is None:
            self._free_block(block)
            return
        block.state, block.waits = State.WAITING, len(block.uses)
        for stream in sorted(block.uses):
            self._waiting.setdefault(stream, deque()).append(block)
        block.uses = None

    def record_stream(self, key: Hashable, stream: int) -> None:
        """What `key` has is used on `stream` too: once freed, it waits until that stream is done with it."""
        block = self._blocks[key]
        if block is not None and stream != block.stream:
            block.uses = (block.uses or set()) | {stream}

    def synchronize(self, stream: int | None = None) -> None:
        """`stream`, or every one, is done with all that was freed so far. The next `malloc` takes note, as in torch."""
        for each in [stream] if stream is not None else sorted(self._waiting):
            self._done += self._waiting.pop(each, ())

    def empty_cache(self) -> None:
        """Wait for every stream, and give back every segment, or page of one, that nothing is in."""
        self.synchronize()
        self._process_events()
        for pool in (self._large, self._small):
            for block in pool.free():
                if block.range is not None:
                    unmap(block, self.device)
                elif not block.split:
                    self._release(block)

    def set_fraction(self, fraction: float) -> None:
        """From now on at most this share of the card may be reserved. Raises ValueError as the constructor does."""
        self.settings = replace(self.settings, per_process_memory_fraction=fraction)
        self._allowed = self._allowance()

    def reset_peaks(self) -> None:
        """From now on the peaks are those of what follows."""
        self.peak_allocated, self.device.peak_reserved = self.allocated, self.reserved

    def layout(self) -> Iterator[tuple[Hashable, Hashable]]:
        """What each block is, and the key of what is in it, in the order of addresses. Where two layouts are equal, so
        is what follows, but for what other streams still use.
        """
        collects = bool(self.settings.garbage_collection_threshold)
        for address in sorted(self.device.segments):
            block: Block | None = self.device.segments[address]
            first = True
            while block is not None:
                free = block.state is State.FREE
                age = block.pool.searches - block.inserted if collects and free else 0
                yield (first, block.size, block.state, block.stream, block.pool.small, age), block.key
                block, first = block.after, False

    def lift_limits(self) -> None:
        """From now on the card is without end."""
        self.device.limit = self._allowed = None

    def rounded(self, nbytes: int) -> int:
        """The size of the block for a request of `nbytes`, 1 or more."""
        if self._rounds and nbytes >= SMALLEST:
            power = nbytes.bit_length() - 1
            interval = min(max(power - 20, 0), INTERVALS - 1)
            steps = self.settings.roundup_power2_divisions[interval]
            if steps > 1 and nbytes > SMALLEST * steps:
                step = (1 << power) // steps
                return -(-nbytes // step) * step
        return -(-nbytes // SMALLEST) * SMALLEST

    def _segment_size(self, size: int) -> int:
        if size <= SMALL:
            return SMALL_SEGMENT
        if size < OWN_SEGMENT:
            return self.settings.large_segment_size
        return -(-size // ROUND_SEGMENT) * ROUND_SEGMENT

    def _best_fit(self, pool: Pool, stream: int, size: int) -> Block | None:
        """The smallest free block that suffices, taken out of the pool."""
        pool.searches += 1
        ordered, index = pool.from_size(stream, size)
        if index == len(ordered):
            return None
        block = pool.at(ordered, index)
        if block.range is not None:  # counts with what it can grow to
            while index + 1 < len(ordered):
                larger = pool.at(ordered, index + 1)
                if larger.expandable_size >= block.expandable_size:
                    break
                block, index = larger, index + 1
        if size < self._max_split <= block.size:
            return None
        if size >= self._max_split and block.size >= size + self.settings.max_non_split_rounding_size:
            return None
        pool.remove(block)
        return block

    def _take(self, block: Block, size: int) -> None:
        """Cut `block` down to `size` where the rest is worth a block."""
        rest = block.size - size
        expandable = block.range is not None
        least = SMALLEST if block.pool.small or expandable else SMALL + 1
        splits = rest >= least and (expandable or size < self._max_split)
        if not expandable:
            if block.split:
                self.inactive_split -= size if splits else block.size
            elif splits:
                self.inactive_split += rest
        if splits:
            block.pool.insert(block.cut(size))

    def _new_block(self, pool: Pool, stream: int, size: int, nbytes: int, key: Hashable) -> Block:
        """A block from new memory, at the cost of the cache if need be. Raises OutOfMemory."""
        if self._allowed is not None and self.settings.garbage_collection_threshold:
            self._collect_garbage(self._allowed)
        block = self._reserve(pool, stream, size)
        if block is None and self._release_large(pool, stream, size):
            block = self._reserve(pool, stream, size)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._reserve(pool, stream, size)
        if block is None:
            self.ooms += 1
            self.device.record("oom", self.device.free or 0, size, stream, key)
            raise OutOfMemory(nbytes, self._segment_size(size), self.device, self._allowed, self.allocated)
        return block

    def _reserve(self, pool: Pool, stream: int, size: int) -> Block | None:
        """A free block of a new segment, or of new pages. None where that is not allowed, or the card is full."""
        segment = self._segment_size(size)
        if self._allowed is not None and self.device.reserved + segment > self._allowed:
            return None
        if self.settings.expandable_segments:
            page = SMALL_SEGMENT if pool.small else self.settings.large_segment_size
            return allocate(pool, stream, size, page, self.device)
        if not self.device.has(segment):
            return None
        block = Block(self.device.addresses(segment), segment, stream, pool)
        self.device.segments[block.address] = block
        self.device.reserve(segment, "segment_alloc", block)
        return block

    def _release(self, block: Block) -> None:
        """Give back the segment that is this one free block."""
        block.pool.remove(block)
        del self.device.segments[block.address]
        self.device.release(block.size, "segment_free", block)

    def _release_large(self, pool: Pool, stream: int, size: int) -> bool:
        """Give back blocks that are too large to be split, until `size` is free. Whether it is."""
        if self.settings.max_split_size is None:
            return False
        ordered, index = pool.from_size(stream, size)
        if index < len(ordered) and pool.at(ordered, index).range is None:
            self._release(pool.at(ordered, index))
            return True
        released = 0
        for block in [pool.at(ordered, each) for each in range(index - 1, -1, -1)]:
            if released >= size or block.size < self._max_split:
                break
            if block.range is None:
                released += block.size
                self._release(block)
        return released >= size

    def _collect_garbage(self, allowed: int) -> None:
        """Give back the segments of the large pool that lie unused for longest, until enough is free."""
        excess = self.device.reserved - int(self.settings.garbage_collection_threshold * allowed)
        if excess <= 0:
            return
        pool = self._large
        unused = [block for block in pool.free() if not block.split and block.range is None]
        reclaimed = 0
        while unused and reclaimed < excess:
            ages = {block: pool.searches - block.inserted for block in unused}
            average = sum(ages.values()) / len(ages)
            for block in [block for block, age in ages.items() if age >= average]:
                reclaimed += block.size
                self._release(block)
            unused = [block for block, age in ages.items() if age < average]

    def _process_events(self) -> None:
        """Free the blocks whose streams are all done."""
        while self._done:
            block = self._done.popleft()
            block.waits -= 1
            if not block.waits:
                self._free_block(block)

    def _free_block(self, block: Block) -> None:
        """Put a block that nothing uses any more into its pool, merged with its neighbours."""
        if self.device.trace is not None:
            self.device.record("free_completed", block.address, block.requested, block.stream, block.key)
        size = block.size
        self.active -= size
        self.requested -= block.requested
        block.state, block.key, block.requested = State.FREE, None, 0
        block = block.merged()
        block.pool.insert(block)
        if block.range is None:
            self.inactive_split += size if block.split else size - block.size
