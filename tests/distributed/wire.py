"""Run by torchrun in a network of its own: what a ledger counts, and what the loopback device carried, as JSON."""

import json
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from harness.ledger import Ledger, Where

TIMES, ELEMENTS = 10, 3 * 2**18
"""ELEMENTS fp32 values, 3 MiB, which two and three ranks share evenly."""


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, part = torch.ones(ELEMENTS), torch.ones(ELEMENTS // size)
    into, share = torch.empty(ELEMENTS), torch.empty(ELEMENTS // size)
    calls: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(into, part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(share, whole),
        "all-to-all": lambda: dist.all_to_all_single(into, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "send": lambda: (dist.send, dist.recv)[rank](whole, 1 - rank) if rank < 2 else None,
    }
    with Ledger(device="cpu", mode="phases") as ledger:
        carried = {name: measured(call, ledger, name) for name, call in calls.items()}
    figures = {name: [counted(ledger, name), *seen] for name, seen in carried.items()}
    with Ledger(device="cpu") as exact:
        seen = measured(reduced(), exact, "DistributedDataParallel")
    figures["DistributedDataParallel"] = [counted(exact, "DistributedDataParallel"), *seen]
    if rank == 0:
        print(json.dumps(figures))
    dist.destroy_process_group()


def reduced() -> Callable[[], object]:
    """A forward and backward of a model whose gradients C++ reduces."""
    model = DistributedDataParallel(torch.nn.Linear(1024, 1024))
    model(torch.ones(2, 1024)).sum().backward()  # the first one arranges its buckets
    return lambda: model(torch.ones(2, 1024)).sum().backward()


def measured(call: Callable[[], object], ledger: Ledger, name: str) -> list[int]:
    """Bytes and packets that the loopback device carries in `TIMES` calls, and the segments that TCP sends twice."""
    with ledger.uncounted():
        dist.barrier()
        before = loopback()
        dist.barrier()  # nobody sends before all have read
    with ledger.phase(name):
        for _ in range(TIMES):
            call()
    dist.barrier()
    return [now - then for now, then in zip(loopback(), before, strict=True)]


def counted(ledger: Ledger, phase: str) -> dict[str, int]:
    """The payload of `phase` by operation."""
    payload = Counter[str]()
    for moved, (_, nbytes) in ledger.traffic.amounts()[Where(0, phase, 0)].items():
        payload[moved.operation] += nbytes
    return payload


def loopback() -> tuple[int, int, int]:
    """Bytes and packets that the loopback device has sent so far, and the segments that TCP has sent again."""
    with open("/proc/net/dev") as file:
        line = next(line for line in file if line.strip().startswith("lo:"))
    with open("/proc/net/snmp") as file:
        names, figures = (line.split() for line in file if line.startswith("Tcp:"))
    sent = line.partition(":")[2].split()
    return int(sent[8]), int(sent[9]), int(dict(zip(names, figures, strict=True))["RetransSegs"])


if __name__ == "__main__":
    main()
