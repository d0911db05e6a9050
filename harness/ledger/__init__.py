"""The ledger: what every live byte of this process is used for, checked against the allocator's own count.

    with Ledger(model=model, optimizer=optimizer) as ledger:
        train()
    ledger.peak.bytes, ledger.peak.categories, ledger.peak.where

It knows nothing about training, inference, Hydra or DeepSpeed: owners name their storages. It may import torch
and no other room. Start reading at `ledger.py`, then `log.py`. `patch_table.py` has all that it replaces in other
packages, and `patch.py` replaces it; that file is for every room.
"""

from typing import TYPE_CHECKING, Any

from harness.ledger.categories import CATEGORIES

if TYPE_CHECKING:
    from harness.ledger.allocator import CpuAllocator
    from harness.ledger.events import Where
    from harness.ledger.in_flight import Forwards
    from harness.ledger.ledger import Ledger
    from harness.ledger.reconcile import Accounting
    from harness.ledger.replay import Category, Peak, Phase
    from harness.ledger.unseen import Gap, NotSeen
    from harness.ledger.work import Work

__all__ = [
    "CATEGORIES",
    "Accounting",
    "Category",
    "CpuAllocator",
    "Forwards",
    "Gap",
    "Ledger",
    "NotSeen",
    "Peak",
    "Phase",
    "Where",
    "Work",
]

_MODULES = {
    "Accounting": "reconcile",
    "Category": "replay",
    "CpuAllocator": "allocator",
    "Forwards": "in_flight",
    "Gap": "unseen",
    "Ledger": "ledger",
    "NotSeen": "unseen",
    "Peak": "replay",
    "Phase": "replay",
    "Where": "events",
    "Work": "work",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use. Everything except the categories needs torch."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'harness.ledger' has no attribute {name!r}")
    return getattr(import_module(f"harness.ledger.{_MODULES[name]}"), name)
