"""The allocator's history in torch's own format of memory snapshots, which https://pytorch.org/memory_viz draws.

The format is that of `torch.cuda.memory._snapshot()`; `MemoryViz.js`, the page's script, reads it. A pickle of plain
dicts, lists, strings and numbers is written, and none is ever read.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.device.allocator_settings import Settings
from harness.device.blocks import Block, State, Trace
from harness.device.caching_allocator import CachingAllocator, OutOfMemory
from harness.device.replay import Step, allocations, follow, steps_of

if TYPE_CHECKING:  # it imports torch
    from harness.ledger.events import Event, Storage

Frame = dict[str, Any]

UNOWNED = (0, 0)
"""The id of the pools that belong to no CUDA graph."""

UNKNOWN = "unknown"
"""The category of what belongs to no storage."""

STATES = {
    State.ALLOCATED: "active_allocated",
    State.WAITING: "active_pending_free",
    State.FREE: "inactive",
}


Timed = tuple[int, Step]
"""A step, whose key is a ledger's storage, and its time in nanoseconds."""


def timed(events: Iterable["Event"]) -> list[Timed]:
    """The births and deaths among a ledger's `events`, all on one stream."""
    births_and_deaths = allocations(events)
    return [
        (event.time, step) for event, step in zip(births_and_deaths, steps_of(births_and_deaths), strict=True)
    ]


def snapshot(
    steps: Iterable[Timed], settings: Settings, limit: int | None = None, capacity: int | None = None
) -> dict[str, Any]:
    """The history of `steps`, and the segments at its end. It ends where memory is out.

    `limit` and `capacity` are as in `CachingAllocator`. A frame names the operator, the source line, the module and the
    category of a storage; the page colours it by the category.
    """
    allocator = CachingAllocator(settings, limit, capacity)
    allocator.device.trace = done = list[Trace]()
    frames_of, history = _remembered(_frames), list[dict[str, Any]]()
    for time, step in steps:
        fits = True
        try:
            follow(allocator, step)
        except OutOfMemory:
            fits = False
        for each in done:
            storage: Any = each.key or (step[0] if step[1] else None)
            frames, category = (frames_of(storage), storage.category) if storage else ([], UNKNOWN)
            history.append(_entry(each, time, frames, category))
        done.clear()
        if not fits:
            break
    history.append(_taken(allocator.active, history[-1]["time_us"] if history else 0))
    return {
        "segments": [*_segments(allocator, frames_of)],
        "device_traces": [history],
        "external_annotations": [],
        "allocator_settings": {
            "expandable_segments": settings.expandable_segments,
            "garbage_collection_threshold": settings.garbage_collection_threshold,
            "max_split_size": -1 if settings.max_split_size is None else settings.max_split_size,
        },
    }


def write(file: Path, taken: dict[str, Any]) -> None:
    """Write a snapshot that memory_viz can open. Raises OSError."""
    file.write_bytes(pickle.dumps(taken, protocol=4))


def _remembered(frames: Callable[[Any], list[Frame]]) -> Callable[[Any], list[Frame]]:
    """`frames`, with one list for all storages of the same origin, so that the file has each only once."""
    known: dict[tuple[str, ...], list[Frame]] = {}

    def of(storage: "Storage") -> list[Frame]:
        origin = (storage.op, storage.line, storage.module, storage.category, storage.name)
        if origin not in known:
            known[origin] = frames(storage)
        return known[origin]

    return of


def _frames(storage: "Storage") -> list[Frame]:
    """What is known of a storage's origin, the innermost first, as torch has it."""
    file, _, line = storage.line.rpartition(":")
    frames = [
        ("operator", 0, storage.op),
        (file, int(line or 0), storage.op or "allocated"),
        ("module", 0, storage.module),
        (storage.category, 0, storage.name or storage.where.phase),
    ]
    return [
        {"filename": filename, "line": number, "name": name}
        for filename, number, name in frames
        if filename and name
    ]


def _entry(trace: Trace, time: int, frames: list[Frame], category: str) -> dict[str, Any]:
    """An entry of the history; `time` in nanoseconds."""
    return {
        "action": trace.action,
        "device_free" if trace.action == "oom" else "addr": trace.address,
        "size": trace.size,
        "stream": trace.stream,
        "pool_id": UNOWNED,
        "time_us": time // 1000,
        "frames": frames,
        "category": category,
    }


def _taken(active: int, microseconds: int) -> dict[str, Any]:
    """The entry of the snapshot itself. The page fails on a history with categories where none is `unknown`."""
    return _entry(Trace("snapshot", 0, active, 0), microseconds * 1000, [], UNKNOWN)


def _segments(
    allocator: CachingAllocator, frames_of: Callable[[Any], list[Frame]]
) -> Iterator[dict[str, Any]]:
    """Each segment by address; of an expandable one, each part that is mapped."""
    for _, first in sorted(allocator.device.segments.items()):
        part: list[Block] = []
        block: Block | None = first
        while block is not None:
            if block.state is not State.UNMAPPED:
                part.append(block)
            elif part:
                yield _segment(part, frames_of)
                part = []
            block = block.after
        if part:
            yield _segment(part, frames_of)


def _segment(part: list[Block], frames_of: Callable[[Any], list[Frame]]) -> dict[str, Any]:
    active = [block for block in part if block.state is not State.FREE]
    first = part[0]
    return {
        "device": 0,
        "address": first.address,
        "total_size": sum(block.size for block in part),
        "allocated_size": sum(block.size for block in active if block.state is State.ALLOCATED),
        "active_size": sum(block.size for block in active),
        "requested_size": sum(block.requested for block in active),
        "stream": first.stream,
        "segment_type": "small" if first.pool.small else "large",
        "segment_pool_id": UNOWNED,
        "is_expandable": first.range is not None,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested,
                "state": STATES[block.state],
                "frames": frames_of(block.key) if block.key is not None else [],
            }
            for block in part
        ],
    }
