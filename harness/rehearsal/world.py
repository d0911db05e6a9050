"""A fake world of any size: one rank of it, in this process, with no peers, no port and no device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.rehearsal.shims import GPU, shimmed
from harness.rehearsal.values import Values
from harness.world import World, variables

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
        made = self.dispatch(func, types, args, kwargs)
        if type(made) is FakeTensor:
            made.constant = None  # Values knows it, and on which device it is
        return made


@contextmanager
def rehearsed(rank: int, size: int, target: str = "cpu") -> Iterator[World]:
    """Rank `rank` of a world of `size` devices of kind `target`; within it every tensor that is made is fake.

    Where `target` is "cuda" there are two fake devices: the world's own, and the host.
    """
    gpu = target == "cuda"
    device = GPU if gpu else torch.device("cpu")
    place = variables(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=0, LOCAL_SIZE=1, DS_ACCELERATOR="cpu")
    with place, shimmed(gpu), _unknown():
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        try:
            with Fakes(allow_non_fake_inputs=True), Values():
                yield World(rank, size, 0, device, rehearsed=True, target=target)
        finally:
            dist.destroy_process_group()


@contextmanager
def _unknown() -> Iterator[None]:
    """DeepSpeed and accelerate remember the first world of a process. Here they know none; after it, what they knew.

    ZeRO-3 leaves its own `linear` in torch for good: that too is what it was.
    """
    from deepspeed import comm
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.utils import groups

    made = {
        name: type(value) for name, value in vars(groups).items() if name.startswith("_") and name.isupper()
    }
    first: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (PartialState._shared_state, {}),
        (vars(comm.comm), {"cdb": None}),
        (vars(real_accelerator), {"ds_accelerator": CPU_Accelerator()}),
        (vars(torch.nn.functional), {"linear": torch._C._nn.linear}),
        (
            vars(groups),
            {"mesh_device": None, **{n: {} if t is dict else None for n, t in made.items() if t is not str}},
        ),
    ]
    before = [(memory, dict(memory)) for memory, _ in first]
    PartialState._shared_state.clear()
    for memory, fresh in first:
        memory.update(fresh)
    try:
        yield
    finally:
        PartialState._shared_state.clear()
        for memory, kept in before:
            memory.update(kept)
