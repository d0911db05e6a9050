"""Training and inference of causal language models under one ledger of every byte.

    from harness import Ledger, rehearse, save, read, show, compare

These names are all that programs need; the command line is `harness --help`. It may import any room, and each name
imports its own when it is first used. Start at `__main__.py`, which has the tools, and `run.py`, which has a run.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Ledger", "compare", "read", "rehearse", "save", "show"]

if TYPE_CHECKING:
    from harness.analysis.compare import compare
    from harness.analysis.summary import show
    from harness.ledger import Ledger
    from harness.record.record_file import read
    from harness.record.save import save
    from harness.rehearsal.program import rehearse

_MODULES = {
    "Ledger": "ledger",
    "compare": "analysis.compare",
    "read": "record.record_file",
    "rehearse": "rehearsal.program",
    "save": "record.save",
    "show": "analysis.summary",
}


def __getattr__(name: str) -> Any:
    """Some of these need torch, so each is imported when it is first used."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(import_module(f"harness.{_MODULES[name]}"), name)
