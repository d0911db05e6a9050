"""Reports to the traffic what is given to process groups, by torch.distributed or by DTensor.

A collective inside a compiled graph reaches its group without Python, and is not seen; `compiled.py` says so.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from harness.ledger.patch import patched
from harness.ledger.patch_table import FUNCTIONAL, GROUP, PATCHES
from harness.ledger.tensors import tensors_in, without_torch_function
from harness.ledger.traffic import Traffic
from harness.ledger.unseen import Figures


class Collective(NamedTuple):
    """An operation of a process group: its name, and the position of the argument that has its payload.

    `times_ranks`: the argument is one rank's part, so the payload is that times the ranks of the group. `peer` is the
    position of the other rank.
    """

    name: str
    payload: int = 0
    times_ranks: bool = False
    peer: int | None = None


_ALL_REDUCE, _BROADCAST = Collective("all-reduce"), Collective("broadcast")
_ALL_GATHER, _REDUCE_SCATTER = Collective("all-gather"), Collective("reduce-scatter", 1)
_ALL_TO_ALL = Collective("all-to-all", 1)

METHODS = {
    "broadcast": _BROADCAST,
    "allreduce": _ALL_REDUCE,
    "allreduce_coalesced": _ALL_REDUCE,
    "reduce": Collective("reduce"),
    "allgather": _ALL_GATHER,
    "_allgather_base": _ALL_GATHER,
    "allgather_coalesced": _ALL_GATHER,
    "allgather_into_tensor_coalesced": _ALL_GATHER,
    "all_gather_single": _ALL_GATHER,
    "all_gather_single_coalesced": _ALL_GATHER,
    "reduce_scatter": _REDUCE_SCATTER,
    "_reduce_scatter_base": _REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced": _REDUCE_SCATTER,
    "reduce_scatter_single": _REDUCE_SCATTER,
    "reduce_scatter_single_coalesced": _REDUCE_SCATTER,
    "gather": Collective("gather", 1, times_ranks=True),
    "scatter": Collective("scatter", 0, times_ranks=True),
    "alltoall": _ALL_TO_ALL,
    "alltoall_base": _ALL_TO_ALL,
    "all_to_all_single": _ALL_TO_ALL,
    "send": Collective("send", peer=1),
    "recv": Collective("receive", peer=1),
    "recv_anysource": Collective("receive"),
}
"""The methods of torch's ProcessGroup that all of `torch.distributed` calls."""

OPERATORS = {
    "all_reduce": _ALL_REDUCE,
    "all_gather_into_tensor": _ALL_GATHER._replace(times_ranks=True),
    "reduce_scatter_tensor": _REDUCE_SCATTER._replace(payload=0),
    "all_to_all_single": _ALL_TO_ALL._replace(payload=0),
    "broadcast": _BROADCAST,
}
"""The operators of `_c10d_functional`, which DTensor calls. They reach the group without Python."""


class ProcessGroups:
    """Counts what this rank gives to its process groups. `failed` is told of what could not be counted."""

    def __init__(self, traffic: Traffic, failed: Callable[[str, Exception, Figures], None]) -> None:
        self._traffic, self._failed = traffic, failed
        self._ranks: dict[str, tuple[int, ...]] = {}

    def watching(self, missed: Callable[[], object]) -> AbstractContextManager[None]:
        """Count inside this context. `missed` is called where DTensor sends. Raises DoesNotFit."""
        self._ranks.clear()  # a later group may have an earlier one's name
        resolve = [f"{FUNCTIONAL}._resolve_group", f"{FUNCTIONAL}._resolve_group_name"]
        return patched(
            *(PATCHES[name].by(partial(_noticed, missed)) for name in resolve),
            *(PATCHES[f"{GROUP}.{name}"].by(partial(self._counted, METHODS[name])) for name in METHODS),
        )

    def _counted(self, collective: Collective, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self._count(collective, group, args)
            return original(group, *args, **kwargs)

        return call

    def functional(self, name: str, args: Sequence[Any]) -> None:
        """Count the operator of `_c10d_functional` with this name and these arguments."""
        plain = name.partition(".")[0].removesuffix("_out").removesuffix("_").removesuffix("_coalesced")
        groups = [
            each for each in args if isinstance(each, str)
        ]  # the last one: the reduction comes before it
        if plain in OPERATORS and groups:
            resolve: Any = torch._C._distributed_c10d._resolve_process_group
            self._count(OPERATORS[plain], resolve(groups[-1]), args)

    @without_torch_function
    def _count(self, collective: Collective, group: Any, args: Sequence[Any]) -> None:
        try:
            tensors = [*tensors_in(args[collective.payload])]
            ranks = self._ranks_of(group)
            if collective.peer is not None:
                ranks = tuple(sorted((ranks[group.rank()], ranks[args[collective.peer]])))
            times = len(ranks) if collective.times_ranks else 1
            nbytes = times * sum(tensor.nbytes for tensor in tensors)
            self._traffic.add(collective.name, nbytes, ranks, tensors[0] if tensors else None)
        except Exception as error:  # an unforeseen kind of group or tensor must not stop the run
            self._failed(collective.name, error, "traffic")

    def _ranks_of(self, group: Any) -> tuple[int, ...]:
        name = group.group_name
        if name not in self._ranks:
            self._ranks[name] = tuple(dist.get_process_group_ranks(group))
        return self._ranks[name]


def _noticed(missed: Callable[[], object], resolve: Callable[..., Any]) -> Callable[..., Any]:
    """`resolve`, which each collective of DTensor calls with its group."""

    def call(group: Any, tag: str = "") -> Any:
        if not torch.compiler.is_compiling():
            missed()
        return resolve(group, tag)

    return call
