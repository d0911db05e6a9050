"""What torch's process groups can be asked for: by the methods of the class, and by the operators of the dispatcher."""

from typing import NamedTuple


class Collective(NamedTuple):
    """An operation of a process group.

    Its payload is the argument with the most bytes. Where not every rank has the whole of it, `part` is the position of
    the argument that has one rank's part. `peer` is the position of the other rank.
    """

    name: str
    part: int | None = None
    peer: int | None = None


ALL_REDUCE, BROADCAST, REDUCE = Collective("all-reduce"), Collective("broadcast"), Collective("reduce")
ALL_GATHER, REDUCE_SCATTER = Collective("all-gather"), Collective("reduce-scatter")
ALL_TO_ALL = Collective("all-to-all")
GATHER, SCATTER = Collective("gather", part=1), Collective("scatter", part=0)
SEND, RECEIVE = Collective("send", peer=1), Collective("receive", peer=1)
UNKNOWN = Collective("")
"""An operation that is not in these tables."""

METHODS = {
    "broadcast": BROADCAST,
    "allreduce": ALL_REDUCE,
    "allreduce_coalesced": ALL_REDUCE,
    "reduce": REDUCE,
    "allgather": ALL_GATHER,
    "_allgather_base": ALL_GATHER,
    "allgather_coalesced": ALL_GATHER,
    "allgather_into_tensor_coalesced": ALL_GATHER,
    "all_gather_single": ALL_GATHER,
    "all_gather_single_coalesced": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "_reduce_scatter_base": REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced": REDUCE_SCATTER,
    "reduce_scatter_single": REDUCE_SCATTER,
    "reduce_scatter_single_coalesced": REDUCE_SCATTER,
    "gather": GATHER,
    "scatter": SCATTER,
    "alltoall": ALL_TO_ALL,
    "alltoall_base": ALL_TO_ALL,
    "all_to_all_single": ALL_TO_ALL,
    "send": SEND,
    "recv": RECEIVE,
    "recv_anysource": RECEIVE._replace(peer=None),
}
"""The methods of ProcessGroup that all of `torch.distributed` calls. The releases of torch have different ones."""

BARRIERS = ("barrier", "monitored_barrier")
"""Those that move no tensor."""

OPERATORS = {
    "c10d::allreduce_": ALL_REDUCE,
    "c10d::allreduce_coalesced_": ALL_REDUCE,
    "c10d::broadcast_": BROADCAST,
    "c10d::reduce_": REDUCE,
    "c10d::allgather_": ALL_GATHER,
    "c10d::_allgather_base_": ALL_GATHER,
    "c10d::allgather_coalesced_": ALL_GATHER,
    "c10d::allgather_into_tensor_coalesced_": ALL_GATHER,
    "c10d::reduce_scatter_": REDUCE_SCATTER,
    "c10d::_reduce_scatter_base_": REDUCE_SCATTER,
    "c10d::reduce_scatter_tensor_coalesced_": REDUCE_SCATTER,
    "c10d::gather_": GATHER,
    "c10d::scatter_": SCATTER,
    "c10d::alltoall_": ALL_TO_ALL,
    "c10d::alltoall_base_": ALL_TO_ALL,
    "c10d::send": SEND._replace(peer=2),
    "c10d::recv_": RECEIVE._replace(peer=2),
    "c10d::recv_any_source_": RECEIVE._replace(peer=None),
    "_c10d_functional::all_reduce": ALL_REDUCE,
    "_c10d_functional::all_reduce_": ALL_REDUCE,
    "_c10d_functional::all_reduce_coalesced": ALL_REDUCE,
    "_c10d_functional::all_reduce_coalesced_": ALL_REDUCE,
    "_c10d_functional::all_gather_into_tensor": ALL_GATHER,
    "_c10d_functional::all_gather_into_tensor_out": ALL_GATHER,
    "_c10d_functional::all_gather_into_tensor_coalesced": ALL_GATHER,
    "_c10d_functional::reduce_scatter_tensor": REDUCE_SCATTER,
    "_c10d_functional::reduce_scatter_tensor_out": REDUCE_SCATTER,
    "_c10d_functional::reduce_scatter_tensor_coalesced": REDUCE_SCATTER,
    "_c10d_functional::all_to_all_single": ALL_TO_ALL,
    "_c10d_functional::broadcast": BROADCAST,
    "_c10d_functional::broadcast_": BROADCAST,
    "_c10d_functional::isend": SEND,
    "_c10d_functional::irecv": RECEIVE,
    "_dtensor::shard_dim_alltoall": ALL_TO_ALL,
}
"""The operators in which every call of a process group ends, also those of C++ and of DTensor."""

WAITS = ("c10d::barrier", "c10d::monitored_barrier_", "c10d::check_for_nan", "_c10d_functional::wait_tensor")
"""Operators that move no tensor."""

SPACES = ("c10d", "_c10d_functional", "_dtensor")


def kind_of(operator: str) -> Collective | None:
    """What the operator of this qualified name moves; None: nothing, `UNKNOWN`: nobody knows."""
    if operator.partition("::")[0] not in SPACES or operator in WAITS:
        return None
    return OPERATORS.get(operator, UNKNOWN)
