"""A fake world of any size: one rank of it, in this process, with no peers, no port and no device."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.rehearsal.shims import shimmed
from harness.rehearsal.values import Values
from harness.world import World


@contextmanager
def rehearsed(rank: int, size: int) -> Iterator[World]:
    """Rank `rank` of a world of `size`; within it every tensor that is made is fake."""
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with shimmed(), FakeTensorMode(allow_non_fake_inputs=True), Values():
            yield World(rank, size, 0, torch.device("cpu"), rehearsed=True)
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
