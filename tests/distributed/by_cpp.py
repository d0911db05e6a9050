"""What a ledger that sums owners says of operations that Python does not give to a process group, as JSON on rank 0."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from harness.ledger import Ledger
from harness.ledger.unseen import NotSeen
from harness.runtime.world import connected


def main(out: str, of_harness: str) -> None:
    if of_harness:
        with connected("cpu", 60):
            act(out)
    else:
        dist.init_process_group("gloo")
        act(out)
        dist.destroy_process_group()


def act(out: str) -> None:
    rows, others = torch.ones(4), 1 - dist.get_rank()
    everybody: Any = dist.group.WORLD
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    tensor = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(0)])

    def exchanged() -> None:
        operations = [dist.P2POp(dist.isend, rows, others), dist.P2POp(dist.irecv, torch.empty(4), others)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def in_a_new_group() -> None:
        group = dist.new_group([0, 1])
        dist.all_reduce(rows, group=group)
        dist.destroy_process_group(group)

    calls: dict[str, Callable[[], object]] = {
        "a barrier": dist.barrier,
        "an all-reduce": lambda: dist.all_reduce(rows),
        "an all-reduce of several": lambda: dist.all_reduce_coalesced([rows, rows]),
        "a reduce-scatter": lambda: dist.reduce_scatter(torch.empty(2), [torch.ones(2), torch.ones(2)]),
        "objects": lambda: dist.all_gather_object([None, None], {"key": 1}),
        "messages": exchanged,
        "in a new group": in_a_new_group,
        "functional": lambda: functional.wait_tensor(functional.all_reduce(rows, "sum", everybody)),
        "DistributedDataParallel": lambda: model(rows).sum().backward(),
        "DTensor": lambda: [tensor.full_tensor() for _ in range(3)],
    }
    if dist.get_backend() == "gloo":
        calls["a monitored barrier"] = dist.monitored_barrier
    said = {}
    for name, call in calls.items():
        with warnings.catch_warnings(), Ledger(device="cpu", mode="phases") as ledger, ledger.phase("act"):
            warnings.simplefilter("ignore", NotSeen)
            call()
        said[name] = [gap.sentence for gap in ledger.gaps]
    if not dist.get_rank():
        Path(out).write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
