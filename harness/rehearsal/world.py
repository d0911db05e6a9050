"""A fake world of any size: this process is one of its ranks, with no peers, no port and no device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.config.layout import Layout
from harness.rehearsal.card import CARD
from harness.rehearsal.fake_mode import Fakes
from harness.rehearsal.known_values import Values
from harness.rehearsal.shims import shimmed
from harness.runtime.world import World, group_of, variables


@contextmanager
def rehearsed(rank: int, layout: Layout, target: str = "cpu") -> Iterator[World]:
    """Become rank `rank` of a world of devices of kind `target`. In this context every new tensor is fake.

    If `target` is "cuda" there are two fake devices: the world's own, and the host.
    """
    gpu = target == "cuda"
    device = CARD if gpu else torch.device("cpu")
    environment = variables(
        RANK=rank, WORLD_SIZE=layout.size, LOCAL_RANK=0, LOCAL_SIZE=1, DS_ACCELERATOR="cpu"
    )
    with environment, shimmed(gpu):
        hook = sys.excepthook  # init_process_group replaces the hook to print the rank, and never restores it
        dist.init_process_group("fake", rank=rank, world_size=layout.size, store=FakeStore())
        try:
            parts: Any = {"stages": layout.stages, "tp_size": layout.tp_size}
            parts["mesh"] = group_of(layout.tp_size, torch.device("cpu"))
            with Fakes(), Values():
                yield World(rank, layout.size, 0, device, fake=True, target=target, **parts)
        finally:
            dist.destroy_process_group()
            sys.excepthook = hook
