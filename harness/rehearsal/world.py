"""A fake world of any size: one rank of it, in this process, with no peers, no port and no device."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.rehearsal.shims import shimmed
from harness.rehearsal.values import Values
from harness.world import World

_VIEWS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("alias", "detach", "expand", "permute", "t", "unsqueeze", "view", "_unsafe_view")
) | {
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.transpose.int,
    torch.ops.aten.select.int,
    torch.ops.aten.view.dtype,
}
"""Operators of one tensor that make a view of it; most of all operators are these."""


class Fakes(FakeTensorMode):
    """A FakeTensorMode that goes to the kernel of a view or a collective at once, in a third of the time."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VIEWS and type(args[0]) is FakeTensor and args[0].fake_mode is self:
            with in_kernel_invocation_manager(self):
                made = func(*args, **kwargs)
            return FakeTensor(self, made, args[0].fake_device)
        if func.namespace == "c10d":  # what it returns are its arguments
            with in_kernel_invocation_manager(self):
                return func(*args, **kwargs)
        return self.dispatch(func, types, args, kwargs)


@contextmanager
def rehearsed(rank: int, size: int, target: str = "cpu") -> Iterator[World]:
    """Rank `rank` of a world of `size` devices of kind `target`; within it every tensor that is made is fake."""
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with shimmed(), Fakes(allow_non_fake_inputs=True), Values():
            yield World(rank, size, 0, torch.device("cpu"), rehearsed=True, target=target)
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
