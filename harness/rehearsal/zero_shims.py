"""Shims for loops of DeepSpeed over all ranks: they work only for the rehearsed rank, with the same bytes.

ZeRO cuts its messages into a slice for each rank, and then uses only its own slice. With 16,384 ranks that is 16,384
views for each parameter, which would take hours on fake tensors. A slice is a view, so leaving it out changes no byte.
"""

import math
import sys
from bisect import bisect_left
from collections import UserDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

Original = Callable[..., Any]

SLICERS = frozenset({"_all_gather_dtype", "get_data_parallel_partitions"})
"""Functions of DeepSpeed that cut a tensor into slices for all ranks, and use only their own rank's slice."""


class Slice(NamedTuple):
    """A part of a flat tensor, before a view of it exists."""

    whole: "Sliced"
    begin: int
    length: int

    def numel(self) -> int:
        """The number of elements."""
        return self.length

    def data_ptr(self) -> int:
        """0, as for any fake tensor."""
        return 0


class Sliced:
    """A flat tensor whose `narrow` is lazy; every other attribute is the tensor's."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        # groups of other ranks' slices sent so far: (elements, whether several slices)
        self.sent: set[tuple[int, bool]] = set()

    def narrow(self, dim: int, start: int, length: int) -> Slice:
        """The slice, with the arguments of `Tensor.narrow`."""
        return Slice(self, start, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def narrow(original: Original) -> Original:
    """`Tensor.narrow` that creates no view for other ranks."""

    def stand_in(self: torch.Tensor, dim: int, start: int, length: int) -> Any:
        if sys._getframe(1).f_code.co_name in SLICERS:
            from deepspeed import comm

            # compare the slice's number with this rank's number in its data-parallel group
            if length and start // length != comm.get_rank() % (self.numel() // length):
                return Slice(Sliced(self), start, length)
        return original(self, dim, start, length)

    return stand_in


def all_gather_wait(original: Original) -> Original:
    """ZeRO-3's `AllGatherCoalescedHandle.wait`: one copy for each parameter, instead of one from every rank's slice."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    def stand_in(self: Any, handle_dependency: bool = True) -> None:
        if self.complete:
            return
        self.allgather_handle.wait()
        flat = next(
            (each.whole.tensor for each in self.partitions if isinstance(each, Slice)), self.partitions[0]
        )
        for parameter in self.params:
            part = flat.narrow(0, 0, parameter.ds_numel)
            parameter.data = torch.cat([part]).view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self.complete = True

    return stand_in


def reduce_scatter_coalesced(original: Original) -> Original:
    """ZeRO-3's `reduce_scatter_coalesced`: it concatenates gradients and padding, and returns only the own slices."""
    from deepspeed import comm

    def stand_in(tensors: Sequence[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
        rank, size = comm.get_rank(group), comm.get_world_size(group)
        chunks = [math.ceil(tensor.numel() / size) for tensor in tensors]
        if len(tensors) == 1 and tensors[0].numel() % size == 0:
            flat = tensors[0].view(-1)
        else:
            parts = []
            for tensor, chunk in zip(tensors, chunks, strict=True):
                parts.append(tensor.view(-1))
                if padding := size * chunk - tensor.numel():
                    parts.append(torch.empty(padding, dtype=tensor.dtype, device=tensor.device))
            flat = torch.cat(parts)
        flat.div_(size)
        own_slice = flat.narrow(0, rank * sum(chunks), sum(chunks))
        comm.reduce_scatter_fn(own_slice, flat, group=group)
        if flat.device == torch.device("cpu"):
            # gloo reduces a temporary copy, and frees it after taking this rank's slice; NCCL needs no copy
            own_slice.copy_(torch.empty_like(flat).narrow(0, rank * sum(chunks), sum(chunks)))
        slices, offset = [], 0
        for tensor, chunk in zip(tensors, chunks, strict=True):
            length = max(0, min(chunk, tensor.numel() - rank * chunk))
            slices.append(own_slice.narrow(0, offset, length))
            offset += chunk
        return slices

    return stand_in


def average_tensor(original: Original) -> Original:
    """ZeRO-1 and 2's `average_tensor`, which cuts a bucket for all ranks: the slices are lazy."""

    def stand_in(self: Any, tensor: torch.Tensor, communication_data_type: torch.dtype) -> Any:
        return original(self, Sliced(tensor), communication_data_type)

    return stand_in


def allreduce_and_copy(original: Original) -> Original:
    """ZeRO-1 and 2's all-reduce of a group of slices.

    Groups with a slice of this rank are all sent. Of the groups with only others' slices, one of each size is sent.
    """

    def stand_in(
        self: Any,
        small_bucket: list[Slice],
        communication_data_type: torch.dtype,
        log: Any = None,
        divide: bool = True,
        process_group: Any = None,
        bucket_ranks: Any = None,
        output_bucket: Any = None,
    ) -> Any:
        from deepspeed import comm

        rank, flat = comm.get_rank(process_group), small_bucket[0].whole
        merged: list[tuple[Slice, Any, Any]] = []
        any_own = False
        for part, ranks, output in zip(small_bucket, bucket_ranks, output_bucket, strict=True):
            is_own = rank in ranks if isinstance(ranks, frozenset) else rank == ranks
            any_own = any_own or is_own
            # never merge down to one piece: a single piece is not copied
            previous = merged[-1][0] if len(merged) > 1 else None
            if (
                previous
                and not is_own
                and merged[-1][1] is None
                and previous.begin + previous.length == part.begin
            ):
                merged[-1] = (previous._replace(length=previous.length + part.length), None, None)
            else:
                merged.append((part, ranks if is_own else None, output))
        group = sum(part.length for part, _, _ in merged), len(merged) > 1
        if not any_own and group in flat.sent:
            _send(group[0], communication_data_type, process_group)
            return
        flat.sent.add(group)
        original(
            self,
            [flat.tensor.narrow(0, part.begin, part.length) for part, _, _ in merged],
            communication_data_type,
            log=log,
            divide=divide,
            process_group=process_group,
            bucket_ranks=[frozenset() if ranks is None else ranks for _, ranks, _ in merged],
            output_bucket=[output for _, _, output in merged],
        )

    return stand_in


def _send(elements: int, dtype: torch.dtype, group: Any) -> None:
    """Send so many elements that have no memory: the traffic counts them."""
    torch.distributed.all_reduce(torch.empty(elements, dtype=dtype, device="meta"), group=group)


PARTITIONS = (
    *("param_to_partition_ids", "is_partition_reduced", "first_param_index_in_partition", "is_grad_computed"),
    *("total_grads_in_partition", "remaining_grads_in_partition"),
    *("grad_partition_insertion_offset", "grad_start_offset"),
)
"""The attributes in which ZeRO-1 and 2 keep numbers for every rank's partition."""


def gradient_partitioning_structures(original: Original) -> Original:
    """ZeRO-1 and 2's `initialize_gradient_partitioning_data_structures`, with `UserDict` in place of `dict`.

    The search for tensors goes through dicts, but not through a UserDict.
    """

    def stand_in(self: Any) -> None:
        original(self)
        for name in PARTITIONS:
            setattr(self, name, UserDict(getattr(self, name)))

    return stand_in


def initialize_gradient_partition(original: Original) -> Original:
    """ZeRO-1 and 2's `initialize_gradient_partition`: a binary search finds a partition's parameters, not a loop."""

    def stand_in(self: Any, i: int, param_group: Sequence[Any], partition_id: int) -> None:
        begins, start = _begins(self, i, param_group), self.partition_size[i] * partition_id
        for place in _span(self, i, param_group, partition_id):
            parameter = self.get_param_id(param_group[place])
            self.param_to_partition_ids[i].setdefault(parameter, []).append(partition_id)
            totals = self.total_grads_in_partition[i]
            totals[partition_id] = totals.get(partition_id, 0) + 1
            self.is_grad_computed[i][partition_id][parameter] = False
            into, out_of = max(0, begins[place] - start), max(0, start - begins[place])
            self.grad_partition_insertion_offset[i][partition_id][parameter] = into
            self.grad_start_offset[i][partition_id][parameter] = out_of

    return stand_in


def get_first_param_index(original: Original) -> Original:
    """ZeRO-1 and 2's `get_first_param_index`, with the same binary search."""

    def stand_in(self: Any, group_id: int, param_group: Sequence[Any], partition_id: int) -> int | None:
        span = _span(self, group_id, param_group, partition_id)
        return span[0] if span else None

    return stand_in


def _span(optimizer: Any, group: int, parameters: Sequence[Any], partition: int) -> range:
    """The indices of those of `parameters` that have a part in a partition of the flat group."""
    begins, size = _begins(optimizer, group, parameters), optimizer.partition_size[group]
    start = size * partition
    first, last = bisect_left(begins, start), bisect_left(begins, start + size)
    straddles = first > 0 and begins[first - 1] + parameters[first - 1].numel() > start
    return range(first - straddles, last)


def _begins(optimizer: Any, group: int, parameters: Sequence[Any]) -> list[int]:
    """The offset of each of `parameters` in the flat group, in elements; cached on the optimizer."""
    begins_by_group = optimizer.__dict__.setdefault("_rehearsal_begins", {})
    if group not in begins_by_group:
        padding = optimizer.round_robin_bit16_padding[group]
        sizes = [parameter.numel() + extra for parameter, extra in zip(parameters, padding, strict=False)]
        begins_by_group[group] = [0, *accumulate(sizes)][: len(sizes)]
    return begins_by_group[group]  # type: ignore[no-any-return]
