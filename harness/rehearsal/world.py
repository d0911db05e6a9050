"""A fake world of any size: this process is one of its ranks, with no peers, no port and no device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.config.layout import Layout
from harness.rehearsal.fake_mode import Fakes
from harness.rehearsal.known_values import Values
from harness.rehearsal.shims import GPU, shimmed
from harness.runtime.world import World, group_of, variables


@contextmanager
def rehearsed(rank: int, layout: Layout, target: str = "cpu") -> Iterator[World]:
    """Become rank `rank` of a world of devices of kind `target`. In this context every new tensor is fake.

    If `target` is "cuda" there are two fake devices: the world's own, and the host.
    """
    gpu = target == "cuda"
    device = GPU if gpu else torch.device("cpu")
    environment = variables(
        RANK=rank, WORLD_SIZE=layout.size, LOCAL_RANK=0, LOCAL_SIZE=1, DS_ACCELERATOR="cpu"
    )
    with environment, shimmed(gpu), _forgotten_world():
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


@contextmanager
def _forgotten_world() -> Iterator[None]:
    """Make DeepSpeed and accelerate forget the world of this process in this context, and restore it at the end.

    Both cache the first world in globals. ZeRO-3 also replaces torch's `linear` and never restores it; this does.
    """
    from deepspeed import comm
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.utils import groups

    types = {
        name: type(value) for name, value in vars(groups).items() if name.startswith("_") and name.isupper()
    }
    initial: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (PartialState._shared_state, {}),
        (vars(comm.comm), {"cdb": None}),
        (vars(real_accelerator), {"ds_accelerator": CPU_Accelerator()}),
        (vars(torch.nn.functional), {"linear": torch._C._nn.linear}),
        (
            vars(groups),
            {"mesh_device": None, **{n: {} if t is dict else None for n, t in types.items() if t is not str}},
        ),
    ]
    saved = [(namespace, dict(namespace)) for namespace, _ in initial]
    PartialState._shared_state.clear()
    for namespace, values in initial:
        namespace.update(values)
    try:
        yield
    finally:
        PartialState._shared_state.clear()
        for namespace, values in saved:
            namespace.update(values)
