"""A fake world of any size: one rank of it, in this process, with no peers, no port and no device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.rehearsal.fake_mode import Fakes
from harness.rehearsal.known_values import Values
from harness.rehearsal.shims import GPU, shimmed
from harness.runtime.world import World, group_of, variables


@contextmanager
def rehearsed(rank: int, size: int, target: str = "cpu", stages: int = 1, tensor: int = 1) -> Iterator[World]:
    """Rank `rank` of a world of `size` devices of kind `target`; within it every tensor that is made is fake.

    Where `target` is "cuda" there are two fake devices: the world's own, and the host.
    """
    gpu = target == "cuda"
    device = GPU if gpu else torch.device("cpu")
    place = variables(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=0, LOCAL_SIZE=1, DS_ACCELERATOR="cpu")
    with place, shimmed(gpu), _unknown():
        hook = sys.excepthook  # the group puts its rank before every traceback, after its end too
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        try:
            parts: Any = {"stages": stages, "tensor": tensor}
            parts["mesh"] = group_of(tensor, torch.device("cpu"))
            with Fakes(), Values():
                yield World(rank, size, 0, device, rehearsed=True, target=target, **parts)
        finally:
            dist.destroy_process_group()
            sys.excepthook = hook


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
