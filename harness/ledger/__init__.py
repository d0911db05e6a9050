"""The ledger: what every byte alive in this process is, and whether that agrees with the allocator's own count.

    with Ledger(model=model, optimizer=optimizer) as ledger:
        train()
    ledger.peak.bytes, ledger.peak.categories, ledger.peak.where

It knows nothing of training, inference, Hydra or DeepSpeed's ways: owners say which storages are theirs.
"""

from harness.ledger.allocator import CpuAllocator
from harness.ledger.ledger import Ledger
from harness.ledger.log import CATEGORIES, Where
from harness.ledger.timeline import Books, Category, Peak, Phase

__all__ = ["CATEGORIES", "Books", "Category", "CpuAllocator", "Ledger", "Peak", "Phase", "Where"]
