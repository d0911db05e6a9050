"""What kernels on the card take beside their results: scratch, and the workspaces of libraries."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from harness.ledger.events import KernelMemory


class CardKernels:
    """For a ledger's log: the memory of each kernel on a card of this compute capability."""

    def __init__(self, capability: float) -> None:
        self.capability = capability

    def __call__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Iterator[KernelMemory]:
        yield from ()
