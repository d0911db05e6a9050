"""Who am I among how many: torchrun's process group, or a world of one."""

import os
import pickle
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from harness.config.settings import Refusal

T = TypeVar("T")

ORDERED_GLOO = "gloo_in_order"
"""gloo with one thread, so that it lets go of tensors in the order of its collectives and memory is repeatable."""


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    members: tuple[tuple[str, int], ...] = ()  # every rank's host name and process id
    rehearsed: bool = False  # the others do not exist
    target: str = ""  # the kind of device whose bytes are wanted, where it is not this one
    stages: int = 1  # of a pipeline; the ranks of a stage follow each other, as in DeepSpeed's topology
    tensor: int = 1  # ranks that share each layer; they follow each other
    mesh: DeviceMesh | None = field(
        default=None, compare=False
    )  # of those that share this rank's; None: it has no group
    _turns: Iterator[int] = field(default_factory=count, compare=False)

    @property
    def device_name(self) -> str:
        """The device's own name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the one that speaks and writes."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """How many whole models there are."""
        return self.size // (self.stages * self.tensor)

    @property
    def stage(self) -> int:
        """Which part of the model this rank has."""
        return self.rank // (self.replicas * self.tensor)

    @property
    def replica(self) -> int:
        """Which of the whole models it is a part of."""
        return self.rank // self.tensor % self.replicas

    @property
    def share(self) -> int:
        """Which of the parts of each layer it has."""
        return self.rank % self.tensor

    def at_stage(self, stage: int) -> int:
        """The rank that has `stage` of this rank's replica, and its part of each layer."""
        return (stage * self.replicas + self.replica) * self.tensor + self.share

    @property
    def kind(self) -> str:
        """The kind of device that the run is for: "cpu" or "cuda"."""
        return self.target or self.device.type

    @property
    def alone(self) -> bool:
        """Whether there is no other process: a world of one, or a rehearsed one of any size."""
        return self.size == 1 or self.rehearsed

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank; in a rehearsal this rank's alone.

        It goes through the group's store, for it is no tensor of the run and has no place in its books.
        """
        if self.alone:
            self.barrier()
            return [value]
        return exchange(value, f"harness/{next(self._turns)}")

    def mean(self, value: float) -> float:
        """The mean of every rank's `value`."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.size


def exchange(value: T, turn: str) -> list[T]:
    """Every rank's `value`, in rank order, on every rank of the default group; `turn` is a name that is used once.

    It goes through the group's store: a collective would be one of the program's, and what it is given is freed by
    another thread, after it returns.
    """
    dist.barrier()  # notices a peer that is gone, which the store would wait for
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    store.set(f"{turn}/{rank}", pickle.dumps(value))  # type: ignore[arg-type]
    if rank == 0:
        values = [store.get(f"{turn}/{each}") for each in range(size)]
        store.set(turn, pickle.dumps(values))  # type: ignore[arg-type]
    return [pickle.loads(each) for each in pickle.loads(store.get(turn))]


def environment() -> tuple[int, int, int]:
    """torchrun's (rank, world size, local rank); a world of one without it."""
    read = os.environ.get
    return int(read("RANK", 0)), int(read("WORLD_SIZE", 1)), int(read("LOCAL_RANK", 0))


@contextmanager
def connected(device: str, timeout: float, stages: int = 1, tensor: int = 1) -> Iterator[World]:
    """Join torchrun's process group, or make a group of one that opens no port; leave it at the end.

    `stages` times `tensor` must divide its size. `timeout` is in seconds; a rank that died is noticed at once, by its
    closed connections, and not by it.
    Raises Refusal for a device that is not there.
    """
    rank, size, local_rank = environment()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    where = _device(device, local_rank, max(here, local_rank + 1))
    backend = "nccl" if where.type == "cuda" else ORDERED_GLOO
    if backend == ORDERED_GLOO and ORDERED_GLOO.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(ORDERED_GLOO, _ordered_gloo, devices=["cpu"])
    store = torch._C._distributed_c10d.HashStore() if size == 1 else None
    with variables(DS_ACCELERATOR=where.type, LOCAL_RANK=local_rank, LOCAL_SIZE=here):
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        try:
            mesh = group_of(tensor, where)
            world = World(rank, size, local_rank, where, stages=stages, tensor=tensor, mesh=mesh)
            yield replace(world, members=tuple(world.gather((socket.gethostname(), os.getpid()))))
        finally:
            dist.destroy_process_group()


def group_of(tensor: int, device: torch.device) -> DeviceMesh | None:
    """This rank's group of `tensor` that follow each other, for which all must ask; None where it is alone."""
    if tensor == 1:
        return None
    group, _ = dist.new_subgroups(tensor)
    return DeviceMesh.from_group(group, device.type, mesh_dim_names=(f"tensor{next(_meshes)}",))


_meshes = count()
"""Meshes so far. DTensors remember by mesh, for as long as a process lives, and know one by its ranks and name: that of
another rehearsed rank, whose part is another, must have another."""


@contextmanager
def variables(**given: object) -> Iterator[None]:
    """The environment with these in it: DeepSpeed reads its place there, and asks numactl for LOCAL_SIZE without it."""
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in given.items()})
    try:
        yield
    finally:  # whoever read it may have written to it
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _ordered_gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._threads = 1
    options._devices = [gloo.create_default_device()]
    return gloo(store, rank, size, options)


def _device(name: str, local_rank: int, ranks: int) -> torch.device:
    """What this rank computes on, of the `ranks` on its node, which are all refused where one has none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        there = torch.cuda.device_count()
        if there == 0:
            raise Refusal("hardware.device", name, "torch sees no GPU here; use hardware.device=cpu")
        if ranks > there:
            raise Refusal(
                "hardware.device",
                name,
                f"each rank needs a GPU of its own; start --nproc-per-node {there} or fewer",
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(name)
