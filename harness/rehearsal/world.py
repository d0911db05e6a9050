"""A fake world of any size: this process is one of its ranks, with no peers, no port and no device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.config.layout import Layout
from harness.rehearsal.card import CARD
from harness.rehearsal.card_memory import CardMemory, being
from harness.rehearsal.card_operators import registered
from harness.rehearsal.fake_mode import Fakes
from harness.rehearsal.shims import shimmed
from harness.runtime.world import World, group_of, variables


@contextmanager
def rehearsed(rank: int, layout: Layout, memory: CardMemory | None = None) -> Iterator[World]:
    """Become rank `rank` of a world of CPUs, or of cards with this `memory`. Every new tensor is fake in it."""
    gpu = memory is not None
    device = CARD if gpu else torch.device("cpu")
    environment = variables(
        RANK=rank, WORLD_SIZE=layout.size, LOCAL_RANK=0, LOCAL_SIZE=1, DS_ACCELERATOR="cpu"
    )
    with environment, nullcontext() if memory is None else being(memory), shimmed(gpu):
        hook = sys.excepthook  # init_process_group replaces the hook to print the rank, and never restores it
        dist.init_process_group("fake", rank=rank, world_size=layout.size, store=FakeStore())
        try:
            parts: Any = {"stages": layout.stages, "tp_size": layout.tp_size}
            parts["mesh"] = group_of(layout.tp_size, device)
            card = memory.card if memory is not None else None
            with nullcontext() if card is None else registered(card), Fakes(card):
                yield World(rank, layout.size, 0, device, fake=True, **parts)
        finally:
            dist.destroy_process_group()
            sys.excepthook = hook
