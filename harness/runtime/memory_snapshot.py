"""torch's own record of the CUDA allocator, for pytorch.org/memory_viz. It has never run on CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.config.settings import Refusal, Settings
from harness.runtime.files import whole

ENTRIES = 1_000_000
"""How many of the last allocations and frees torch keeps. Each takes about 1 KiB of host memory, for its stack."""


def check(settings: Settings, device: torch.device) -> None:
    """Refuse a snapshot on a device that is not a GPU."""
    if settings.ledger.snapshot and device.type != "cuda":
        remedy = (
            f"torch records CUDA's allocator only, and this run is on {device.type}; trace/ has every event"
        )
        raise Refusal("ledger.snapshot", True, remedy)


def snapshot_file(directory: Path, rank: int) -> Path:
    """The file of a rank's snapshot."""
    return directory / f"snapshot-{rank}.pickle"


@contextmanager
def kept(directory: Path, rank: int) -> Iterator[None]:
    """Write `snapshot-RANK.pickle` of what happens inside this context. The harness never reads it."""
    file = snapshot_file(directory, rank)
    torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    try:
        yield
    finally:
        with whole(file) as partial:
            torch.cuda.memory._dump_snapshot(str(partial))
        torch.cuda.memory._record_memory_history(enabled=None)
