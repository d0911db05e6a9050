"""Training and inference of causal language models under one ledger of every byte."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Ledger"]

if TYPE_CHECKING:
    from harness.ledger import Ledger


def __getattr__(name: str) -> Any:
    """`Ledger` needs torch, and is imported when it is first asked for."""
    if name == "Ledger":
        from harness.ledger import Ledger

        return Ledger
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
