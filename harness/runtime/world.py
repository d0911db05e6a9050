"""This process among the ranks of a run: torchrun's process group, or a world of one."""

import os
import pickle
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from harness.config.layout import Layout
from harness.config.settings import Refusal

T = TypeVar("T")

ORDERED_GLOO = "gloo_in_order"
"""gloo with one thread, so that it releases tensors in the order of its collectives and memory is repeatable."""


_STOP = "harness/stop"

_timeout: ContextVar[timedelta | None] = ContextVar("timeout", default=None)
"""How long a rank waits in the groups of this run. DeepSpeed makes some, and torch would give those 30 minutes."""


@contextmanager
def _waiting(seconds: float) -> Iterator[timedelta]:
    before = _timeout.set(timedelta(seconds=seconds))
    try:
        yield timedelta(seconds=seconds)
    finally:
        _timeout.reset(before)


@dataclass(frozen=True)
class World:
    """The position of this process: `rank` of `size`, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    members: tuple[tuple[str, int], ...] = ()  # every rank's host name and process id
    timeout: float = 600.0  # the seconds that a rank waits for others
    fake: bool = False  # the other ranks do not exist
    stages: int = 1  # pipeline stages
    tp_size: int = 1  # ranks that share each layer
    # the ranks that share this rank's layers; None: there is no such group
    mesh: DeviceMesh | None = field(default=None, compare=False)
    _exchange_numbers: Iterator[int] = field(default_factory=count, compare=False)

    @property
    def device_name(self) -> str:
        """The name of the device's model."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def layout(self) -> Layout:
        """The place of every rank."""
        return Layout(self.size, self.stages, self.tp_size)

    @property
    def dp_size(self) -> int:
        """The number of replicas: whole models, which have different data."""
        return self.layout.dp_size

    @property
    def stage(self) -> int:
        """The pipeline stage of this rank."""
        return self.layout.stage(self.rank)

    @property
    def dp_rank(self) -> int:
        """The replica of which this rank is a part."""
        return self.layout.dp_rank(self.rank)

    @property
    def tp_rank(self) -> int:
        """This rank's part of each layer."""
        return self.layout.tp_rank(self.rank)

    def at_stage(self, stage: int) -> int:
        """The rank at `stage` of this rank's replica, with the same part of each layer."""
        return self.layout.rank(stage, self.dp_rank, self.tp_rank)

    @property
    def kind(self) -> str:
        """The device type of the run: "cpu" or "cuda"."""
        return self.device.type

    @property
    def alone(self) -> bool:
        """Whether there is no other process: a world of one, or a fake one of any size."""
        return self.size == 1 or self.fake

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank. In a fake world only this rank's.

        It uses the group's store, because a tensor would count in the run's memory.
        """
        if self.alone:
            self.barrier()
            return [value]
        return exchange(value, f"harness/{next(self._exchange_numbers)}")

    def stops_after(self, step: int, asked: bool) -> bool:
        """Whether all ranks end after `step`, because one of them was `asked` to. Every rank calls it after each step.

        The first rank that was asked names the next step. No rank ends that step before all have begun it, so all of
        them read the name in time, without a collective.
        """
        if self.alone:
            return asked
        store = dist.distributed_c10d._get_default_store()
        if asked:
            store.compare_set(_STOP, "", str(step + 1))
        return store.check([_STOP]) and int(store.get(_STOP)) <= step

    def mean(self, value: float) -> float:
        """The mean of every rank's `value`."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.size


def exchange(value: T, key: str) -> list[T]:
    """Every rank's `value`, in rank order, on every rank of the default group. `key` is used only once.

    It uses the group's store. A collective would be one of the program's, and another thread frees its tensors after it
    returns.
    """
    dist.barrier()  # fails if a peer has ended; the store would wait for it
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    store.set(f"{key}/{rank}", pickle.dumps(value))  # type: ignore[arg-type]
    if rank == 0:
        values = [store.get(f"{key}/{item}") for item in range(size)]
        store.set(key, pickle.dumps(values))  # type: ignore[arg-type]
    return [pickle.loads(item) for item in pickle.loads(store.get(key))]


def environment() -> tuple[int, int, int]:
    """torchrun's (rank, world size, local rank). Without torchrun, a world of one."""
    get = os.environ.get
    return int(get("RANK", 0)), int(get("WORLD_SIZE", 1)), int(get("LOCAL_RANK", 0))


def unmet() -> World:
    """This process before it has met the other ranks: their processes and its device are not known."""
    rank, size, local_rank = environment()
    return World(rank, size, local_rank, torch.device("cpu"))


@contextmanager
def connected(device: str, timeout: float, stages: int = 1, tp_size: int = 1) -> Iterator[World]:
    """Join torchrun's process group, or create a group of one that opens no port. Leave it at the end.

    `stages` times `tp_size` must divide its size. `timeout` is in seconds. It does not delay the notice of a dead rank,
    whose connections close at once.
    Raises Refusal for a device that does not exist.
    """
    rank, size, local_rank = environment()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own_device = _device(device, local_rank, max(local_size, local_rank + 1))
    backend = "nccl" if own_device.type == "cuda" else ORDERED_GLOO
    if backend == ORDERED_GLOO and ORDERED_GLOO.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(ORDERED_GLOO, _ordered_gloo, devices=["cpu"])
    store = torch._C._distributed_c10d.HashStore() if size == 1 else None
    with (
        variables(DS_ACCELERATOR=own_device.type, LOCAL_RANK=local_rank, LOCAL_SIZE=local_size),
        _waiting(timeout) as patience,
    ):
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        try:
            mesh = group_of(tp_size, own_device)
            world = World(
                rank, size, local_rank, own_device, (), timeout, stages=stages, tp_size=tp_size, mesh=mesh
            )
            yield replace(world, members=tuple(world.gather((socket.gethostname(), os.getpid()))))
        finally:
            dist.destroy_process_group()


def group_of(tp_size: int, device: torch.device) -> DeviceMesh | None:
    """This rank's group of `tp_size` consecutive ranks. All ranks must call it. None for a group of one."""
    if tp_size == 1:
        return None
    group, _ = dist.new_subgroups(tp_size)
    return DeviceMesh.from_group(group, device.type, mesh_dim_names=(f"tensor{next(_mesh_numbers)}",))


_mesh_numbers = count()
"""Number of meshes so far, for unique names. DTensor caches by mesh for the life of a process, and identifies a mesh by
its ranks and name. Another rehearsed rank has another part, so its mesh needs another name."""


@contextmanager
def variables(**values: object) -> Iterator[None]:
    """Set environment variables inside this context.

    DeepSpeed reads its rank there, and runs numactl if LOCAL_SIZE is missing.
    """
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:  # code inside may have changed the environment
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _ordered_gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = _timeout.get() or timeout
    options._threads = 1
    options._devices = [gloo.create_default_device()]
    return gloo(store, rank, size, options)


def _device(name: str, local_rank: int, ranks: int) -> torch.device:
    """This rank's device. All `ranks` on a node are refused if one of them has no device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        device_count = torch.cuda.device_count()
        if device_count == 0:
            raise Refusal("hardware.device", name, "torch sees no GPU here; use hardware.device=cpu")
        if ranks > device_count:
            raise Refusal(
                "hardware.device",
                name,
                f"each rank needs a GPU of its own; start --nproc-per-node {device_count} or fewer",
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(name)
