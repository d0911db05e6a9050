"""What kernels on the card take beside their results: scratch, and the workspaces of libraries."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from harness.device.operators import NAMESPACES, SCRATCH, scratch
from harness.device.workspaces import CUBLAS, LT_ALWAYS, Workspaces, addmm_on_lt
from harness.ledger.events import KernelMemory
from harness.ledger.modules import in_backward
from harness.ledger.tensors import tensors_in
from harness.rehearsal.card import CARD
from harness.rehearsal.card_memory import CardMemory

FORWARD, BACKWARD = 0, 1
"""Threads: the program's own, and the one in which autograd runs what is on a GPU. Each has handles of its own."""


class CardKernels:
    """The memory of each kernel on the card with this `memory`, for a ledger's log."""

    def __init__(self, memory: CardMemory) -> None:
        self._memory, self._card = memory, memory.card
        self._workspaces = Workspaces(self._card.capability, os.environ, _release())

    def __call__(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any
    ) -> Iterator[KernelMemory]:
        name = func.__name__.partition(".")[0]
        cublas = name in CUBLAS
        if not (cublas or name in SCRATCH) or func.namespace not in NAMESPACES or not _on_card(args, out):
            return
        if cublas:
            yield from self._workspace(name, args, kwargs)
        moments = scratch(func, args, kwargs, out, self._card)
        if moments is None:
            self._memory.unknown[name] = None
        for number, moment in enumerate(moments or ()):
            for nbytes in moment.blocks:
                yield KernelMemory(f"scratch of {name}", nbytes, number, not moment.outputs)

    def _workspace(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[KernelMemory]:
        thread = BACKWARD if in_backward() else FORWARD
        lt = name in LT_ALWAYS or (
            name == "addmm" and addmm_on_lt(args[0], args[1], args[2], kwargs.get("beta", 1), os.environ)
        )
        for nbytes in self._workspaces.take(thread=thread, stream=self._memory.stream, lt=lt):
            yield KernelMemory(
                f"cuBLAS workspace of the {('forward', 'backward')[thread]}'s thread", nbytes, None
            )


def _on_card(*trees: Any) -> bool:
    tensor = next((each for tree in trees for each in tensors_in(tree)), None)
    return tensor is not None and getattr(tensor, "fake_device", None) == CARD


def _release() -> tuple[int, int]:
    """torch's release, as (2, 13)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
