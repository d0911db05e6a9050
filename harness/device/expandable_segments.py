"""Expandable segments: a range of addresses for each stream and pool, of which pages are mapped when needed.

A page is 2 MiB in the small pool, and in the large one the size of a large segment. Pages that no block touches are
unmapped when the cache is released. That a page's memory cannot lie in two parts is CUDA's limit, not modelled further.
"""

from harness.device.blocks import AddressRange, Block, Device, Pool, State

TERABYTE = 1024**4
"""Addresses of a range where the card's memory is not known."""


def allocate(pool: Pool, stream: int, size: int, page: int, device: Device) -> Block | None:
    """A free block of at least `size` bytes, in no pool, from pages that are mapped now. None: out of memory."""
    block = _lowest(pool, stream, size) or _new_range(pool, stream, page, device)
    mapped: Block | None = block
    if block.state is State.UNMAPPED:
        mapped = _map(block, min(block.size, size), device)
    while mapped is not None and mapped.size < size:
        unmapped = mapped.after
        assert unmapped is not None
        mapped = _map(unmapped, min(size - mapped.size, unmapped.size), device)
    if mapped is not None:
        pool.remove(mapped)
    return mapped


def unmap(block: Block, device: Device) -> None:
    """Give back the whole pages of `block`, which is free and in its pool; the range too, if nothing else is in it."""
    range_, pool = block.range, block.pool
    assert range_ is not None
    first = -(-(block.address - range_.start) // range_.page) * range_.page + range_.start
    last = (block.address + block.size - range_.start) // range_.page * range_.page + range_.start
    if first >= last:
        return
    pool.remove(block)
    if block.address < first:
        block, front = block.cut(first - block.address), block
        pool.insert(front)
    if block.address + block.size > last:
        pool.insert(block.cut(last - block.address))
    block.state = State.UNMAPPED
    device.release(block.size, "segment_unmap", block)
    block = block.merged()
    if block.split:
        pool.insert(block)
    else:
        del device.segments[block.address]


def _lowest(pool: Pool, stream: int, size: int) -> Block | None:
    """Where the lowest addresses begin that are not in use and that suffice for `size`."""
    for unmapped in pool.address_space(stream):
        before = unmapped.before
        block = before if before is not None and before.state is State.FREE else unmapped
        room, part = 0, block
        while room < size and part.state in (State.FREE, State.UNMAPPED):
            room += part.size
            if part.after is None:
                break
            part = part.after
        if room >= size:
            return block
    return None


def _new_range(pool: Pool, stream: int, page: int, device: Device) -> Block:
    """A new range of addresses, nothing of it mapped: one eighth more than the card's memory."""
    total = device.capacity or TERABYTE
    size = -(-(total + total // 8) // page) * page
    start = device.addresses(size)
    block = Block(start, size, stream, pool, AddressRange(start, size, page))
    block.state = State.UNMAPPED
    pool.insert(block)
    device.segments[start] = block
    return block


def _map(block: Block, size: int, device: Device) -> Block | None:
    """Map the pages of the first `size` bytes of `block`, and merge. None, and nothing mapped, where memory is out."""
    range_, pool = block.range, block.pool
    assert range_ is not None
    mapped = -(-size // range_.page) * range_.page
    if not device.has(mapped):
        return None
    pool.remove(block)
    if mapped < block.size:
        rest = block.cut(mapped)
        rest.state = State.UNMAPPED
        pool.insert(rest)
    block.state = State.FREE
    device.reserve(mapped, "segment_map", block)
    block = block.merged()
    pool.insert(block)
    return block
