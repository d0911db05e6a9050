"""Scratch of the operators that sort, select and scatter on CUDA."""

from math import prod
from typing import Any

import torch

from harness.device import cub
from harness.device.call import Call, Card, Moment, Moments, accumulated, copies, nbytes, once, rows

_INDEX = 2**31 - 1


def embedding_dense_backward(call: Call) -> Moments:
    """Up to 3,072 indices: none. Above: the indices are sorted, and partial sums of 10 rows each kept in fp32.

    ATen/native/cuda/Embedding.cu sorts with cub while no output exists yet; EmbeddingBackwardKernel.cu then has room
    for as many segments as there may be distinct indices, since it does not wait for their number.
    """
    grad, indices, weights = call["grad_output"], call["indices"], call["num_weights"]
    count, width, size = indices.numel(), grad.shape[-1], indices.element_size()
    copied = copies(indices, grad)
    if count <= 3072 and not call["scale_grad_by_freq"]:
        return once(*copied)
    sort = cub.radix_sort(count, size, size, call.card)
    if sort is None:
        return None
    column = count * size
    segments = min(count, weights)
    partial = count // 10 + segments
    kept = (*copied, column, column, *((column,) if call["scale_grad_by_freq"] else ()))
    sums = partial * width * accumulated(grad.dtype)
    offsets = (column, 8, segments * size, segments * size, 8, partial * size)
    return (
        Moment((*copied, column, column, column, sort), outputs=False),
        Moment((*kept, *offsets, sums)),
    )


def sort(call: Call) -> Moments:
    """Rows of up to 4,096: one index row. Longer ones go to cub, which needs indices and copies of all.

    ATen/native/cuda/Sort.cpp, Sort.h and SortStable.cu: rows are sorted one by one where there is one or each has a
    million elements, all at once by value and then by row below 128 rows, and segment by segment from 128 rows.
    """
    values = call["self"]
    dim = call["dim"] if call["dim"] is not None else -1
    if values.dim() == 0 or values.numel() == 0:
        return ()
    length = values.shape[dim]
    if length <= 4096:
        return once(length * 8)
    return sorted_long(values, dim, call.outs, call.card)


def sorted_long(
    values: torch.Tensor, dim: int, outs: tuple[torch.Tensor, ...], card: Card
) -> tuple[Moment, ...] | None:
    """The blocks of a sort of more than 4,096 elements along `dim`, which cub does."""
    count, length, size = values.numel(), values.shape[dim], values.element_size()
    if count > _INDEX:
        return None  # in batches
    dense = values.numel() == 1 or _dense(values)
    moved: tuple[int, ...] = () if dense and values.stride(dim) == 1 else (nbytes(values),)
    if moved:  # then what cub writes is laid out like the copy, with `dim` last
        last = _strides_with_last(values, dim)
        moved = (*moved, *(nbytes(each) for each in outs if each.stride() != last))
    slices = count // length
    if slices == 1 or length >= 1_000_000:
        return _with(moved, (length * 8,), cub.radix_sort(length, size, 8, card))
    if slices < 128:
        return _with(moved, (count * 8, count * 8, count * size), cub.radix_sort(count, size, 8, card))
    return _with(moved, (count * 8,), cub.segmented_radix_sort(count, size, 8))


def _with(moved: tuple[int, ...], blocks: tuple[int, ...], temporary: int | None) -> Moments:
    return None if temporary is None else (Moment((*moved, *blocks, temporary)),)


def _dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements fill its memory without gaps or overlaps, in any order of its axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _strides_with_last(tensor: torch.Tensor, dim: int) -> tuple[int, ...]:
    """Dense strides in the order of a tensor's own, but with `dim` the fastest: infer_dense_strides_dim_last."""
    dim %= tensor.dim()
    own: tuple[int, ...] = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda at: (at == dim, -own[at]))
    strides, step = [0] * tensor.dim(), 1
    for at in reversed(order):
        strides[at] = step
        step *= tensor.shape[at]
    return tuple(strides)


_MULTIBLOCK = ((20, 20_000), (40, 10_000), (80, 8_000), (199, 5_000), (799, 3_000), (4_000, 800))
"""Up to this many slices, several blocks share a slice from this length on; from 400 elements where there are more."""


def topk(call: Call) -> Moments:
    """A block per slice needs nothing; where several share one, each keeps the counts of 256 digits.

    ATen/native/cuda/TensorTopK.cu (mbtopk), as it was in 2026; before, no slice had a cumulative sum of its digits.
    Results of more than 4,096 are sorted afterwards (TensorTopK.cpp), which is not worked out here.
    """
    values, k = call["self"], call["k"]
    if values.dim() == 0 or values.numel() == 0:
        return ()
    if call["sorted"] and k > 4096:
        return None
    slices, length = rows(values, call["dim"]), values.shape[call["dim"]]
    copied = copies(values)
    least = next((long for many, long in _MULTIBLOCK if slices <= many), 400)
    if length < least:
        return once(*copied)
    if call.card.multiprocessors is None:
        return None
    per_thread = -(-length * slices // (call.card.multiprocessors * 6 * 256))
    blocks = slices * -(-length // (min(max(per_thread, 4), 64) * 256))
    bits = 8 if values.element_size() == 8 else 4
    counts = (blocks * 256 * 2, slices * 256 * 4, blocks * 4, blocks * 4)
    per_slice = (slices * values.element_size(), 2 * slices * 4, 2 * slices * bits)
    return once(*copied, *per_slice, *counts, cub.scan_at_most(blocks))


def index_put(call: Call) -> Moments:
    """Accumulating, or deterministic: all linear indices are sorted with cub. Else none.

    ATen/native/cuda/Indexing.cu, index_put_with_sort_kernel. The backward of indexing is such a call.
    """
    if not (call["accumulate"] or torch.are_deterministic_algorithms_enabled()):
        return ()
    target, values, indices = call["self"], call["values"], call["indices"]
    given = [each for each in indices if each is not None]
    if any(each.dtype in (torch.bool, torch.uint8) for each in given):
        return None  # how many elements a mask takes depends on its values
    count = prod(torch.broadcast_shapes(*(each.shape for each in given)))
    taken = prod(size for size, index in zip(target.shape, indices, strict=False) if index is not None)
    shape = _taken_shape(target, indices, given)
    if prod(shape) == 0:
        return ()
    written = values.expand(shape)
    inner = _inner(target, indices)
    largest = max(target.numel() - 1, 0) // inner
    bits = max(largest.bit_length(), 1)
    if taken == 0:
        return ()
    sort = cub.radix_sort(count, 8, 8, call.card, bits)
    if sort is None:
        return None
    return once(*copies(target, written), *(4 * (count * 8,)), sort)


def _adjacent(indices: Any) -> bool:
    at = [position for position, each in enumerate(indices) if each is not None]
    return at[-1] - at[0] + 1 == len(at)


def _taken_shape(target: torch.Tensor, indices: Any, given: list[torch.Tensor]) -> tuple[int, ...]:
    """The shape of `target[indices]`."""
    broadcast = tuple(torch.broadcast_shapes(*(each.shape for each in given)))
    whole = [size for at, size in enumerate(target.shape) if at >= len(indices) or indices[at] is None]
    first = next(at for at, each in enumerate(indices) if each is not None) if _adjacent(indices) else 0
    return (*whole[:first], *broadcast, *whole[first:])


def _inner(target: torch.Tensor, indices: Any) -> int:
    """Elements of one indexed slice: the axes after the last indexed one, or all that are not indexed."""
    after = [at for at, size in enumerate(target.shape) if at >= len(indices) or indices[at] is None]
    if _adjacent(indices):
        last = max(at for at, each in enumerate(indices) if each is not None)
        after = [at for at in after if at > last]
    return prod(target.shape[at] for at in after)


def multinomial(call: Call) -> Moments:
    """One sample, or without replacement: noise of the input's size. Else three copies of the input.

    ATen/native/Distributions.cpp divides by exponential noise, of which it takes the largest, or the largest few with
    their values; ATen/native/cuda/MultinomialKernel.cu keeps the distribution, its normalised form and its cumulative
    sum.
    """
    weights = call["self"]
    if call["num_samples"] == 1:
        return once(nbytes(weights))
    if not call["replacement"]:
        return once(nbytes(weights), call.outs[0].numel() * weights.element_size())
    return once(*(3 * (nbytes(weights),)))


def cumsum(call: Call) -> Moments:
    """One row is scanned with cub: at most a 500th of the output. Several rows are scanned without scratch.

    ATen/native/cuda/ScanUtils.cuh, scan_dim.
    """
    values = call["self"]
    cast = call.outs[0].element_size() * values.numel() if values.dtype != call.outs[0].dtype else 0
    copied = () if cast else copies(values)
    if values.dim() == 0 or values.numel() == 0:
        return ()
    one_row = values.shape[call["dim"]] == values.numel()
    return once(cast, *copied, cub.scan_at_most(values.numel()) if one_row else 0)


def repeat_interleave(call: Call) -> Moments:
    """The cumulative sum of the repeats: ATen/native/Repeat.h."""
    repeats = call["repeats"]
    if not isinstance(repeats, torch.Tensor):
        return ()
    return once(repeats.numel() * 8, cub.scan_at_most(repeats.numel()))
