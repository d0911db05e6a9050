"""torch's own record of CUDA's allocator, beside a run's, for pytorch.org/memory_viz. It has never run on CUDA."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.config.settings import Refusal, Settings

ENTRIES = 1_000_000
"""The last allocations and frees that torch keeps; each takes about a KiB of host memory, for its stack."""


def check(settings: Settings, device: torch.device) -> None:
    """Refuse to keep one of what is no GPU's."""
    if settings.ledger.snapshot and device.type != "cuda":
        remedy = (
            f"torch keeps one of CUDA's allocator, and this run is on {device.type}; trace/ has every event"
        )
        raise Refusal("ledger.snapshot", True, remedy)


@contextmanager
def kept(directory: Path, rank: int) -> Iterator[None]:
    """Leave `snapshot-RANK.pickle` of what happens within; nothing here ever reads it."""
    file = directory / f"snapshot-{rank}.pickle"
    partial = file.with_suffix(".partial")
    torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(partial))
        torch.cuda.memory._record_memory_history(enabled=None)
        os.replace(partial, file)
