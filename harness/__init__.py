"""Training and inference of causal language models under one ledger of every byte."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Ledger", "save"]

if TYPE_CHECKING:
    from harness.ledger import Ledger
    from harness.record.save import save

_ROOMS = {"Ledger": "ledger", "save": "loop"}


def __getattr__(name: str) -> Any:
    """These need torch, and are imported when they are first asked for."""
    from importlib import import_module

    if name not in _ROOMS:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(import_module(f"harness.{_ROOMS[name]}"), name)
