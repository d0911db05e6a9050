"""The staging memory of a reduction that CUDA splits over thread blocks: ATen/native/cuda/Reduce.cuh.

Where few outputs have many inputs each, several blocks share one output and meet in global memory. The buffer is
requested for every output times every lane of a block, so that the sum of a matrix over its rows, the gradient of a
bias, can take more than the matrix itself.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from harness.device.call import Card

_THREADS = 512
_LEAST_VALUES, _MOST_VALUES = 16, 256
"""Values per thread: below the second a reduction is not split, and never into fewer than the first."""

_INDEX = 2**31 - 1


class Axis(NamedTuple):
    """One axis of the iteration: its length, the input's stride in elements, the output's (None: reduced)."""

    size: int
    stride: int
    out: int | None


def axes(shape: Sequence[int], strides: Sequence[int], dims: Sequence[int]) -> list[Axis]:
    """The axes that TensorIterator iterates over: the reduced ones first, the fastest first, neighbours joined."""
    out, each = 1, []
    for at in reversed(range(len(shape))):
        each.append(Axis(shape[at], strides[at], None if at in dims else out))
        out *= 1 if at in dims else shape[at]
    reduced = sorted((one for one in each if one.out is None), key=lambda one: one.stride)
    return _joined([*reduced, *(one for one in each if one.out is not None)])


def _joined(each: Sequence[Axis]) -> list[Axis]:
    """Adjacent axes as one where both tensors step through them evenly: TensorIterator's coalesce_dimensions."""
    joined: list[Axis] = []
    for axis in each:
        before = joined[-1] if joined else None
        if before and before.size == 1:
            joined[-1] = axis
        elif before and (axis.size == 1 or _continues(before, axis)):
            joined[-1] = before._replace(size=before.size * axis.size)
        else:
            joined.append(axis)
    return joined


def _continues(before: Axis, axis: Axis) -> bool:
    if (before.out is None) != (axis.out is None) or before.size * before.stride != axis.stride:
        return False
    return before.out is None or axis.out is None or before.size * before.out == axis.out


def staging(
    each: Sequence[Axis],
    *,
    element: int,
    accumulated: int,
    card: Card,
    offset: int = 0,
) -> tuple[int, ...] | None:
    """The blocks of one reduction: the staging buffer and its semaphores, or none where it is not split.

    element: bytes of an input element; accumulated: of the type that is reduced, as 4 for the sum of bf16 and 16 for
    argmax; offset: the input's storage offset, in elements. None where the card's number of multiprocessors is unknown,
    and where an input that needs 64-bit indices has elements smaller than `accumulated`: it takes a buffer more.
    """
    if prod(axis.size for axis in each) == 0 or not each:
        return ()
    if card.multiprocessors is None:
        return None
    if 1 + sum((a.size - 1) * a.stride for a in each) * element > _INDEX:
        if element < accumulated:
            return None
        halves = (
            staging(half, element=element, accumulated=accumulated, card=card, offset=offset)
            for half in _halves(each)
        )
        return max((half for half in halves if half is not None), key=sum)
    inputs = prod(axis.size for axis in each if axis.out is None)
    outputs = prod(axis.size for axis in each if axis.out is not None)
    reduced = sum(axis.out is None for axis in each)
    along = reduced == len(each) or (reduced > 0 and each[0].stride < each[reduced].stride)
    fastest = each[0 if along else reduced].stride
    width, height = (inputs, outputs) if along else (outputs, inputs)
    lanes = 1  # how much a thread loads at once along a reduced axis matters only where nothing is split
    if fastest == 1 and not along:
        lanes = _output_vector(each, reduced, offset)
        width //= lanes
    return _split(
        block=_block(width, height, _THREADS // lanes),
        along=along,
        inputs=inputs,
        outputs=outputs,
        lanes=lanes,
        accumulated=accumulated,
        card=card,
    )


def _halves(each: Sequence[Axis]) -> Iterator[list[Axis]]:
    """The parts of which each is reduced by itself: the axis of the largest extent is cut in the middle
    (TensorIterator's with_32bit_indexing).
    """
    at = max(range(len(each)), key=lambda index: (each[index].size - 1) * each[index].stride)
    first = each[at].size // 2
    for size in (first, each[at].size - first):
        yield [*each[:at], each[at]._replace(size=size), *each[at + 1 :]]


def _output_vector(each: Sequence[Axis], output: int, offset: int) -> int:
    """How many neighbouring outputs a thread takes at once: 4, 2 or 1, as alignment allows."""
    lanes = 4
    for number in (offset, each[output].size, *(axis.stride for at, axis in enumerate(each) if at != output)):
        while number % lanes:
            lanes //= 2
    return lanes


def _block(width: int, height: int, threads: int) -> tuple[int, int]:
    """A thread block's width and height."""
    wide, high = (1 << (min(max(side, 1), threads).bit_length() - 1) for side in (width, height))
    tall = min(high, threads // min(wide, 32))
    return min(wide, threads // tall), tall


def _split(
    *,
    block: tuple[int, int],
    along: bool,
    inputs: int,
    outputs: int,
    lanes: int,
    accumulated: int,
    card: Card,
) -> tuple[int, ...]:
    width, height = block
    step_in, step_out = (width, 1) if along else (1, width)
    across = -(-inputs // step_in) >= min(height * 16, _MOST_VALUES)
    step_in, step_out = (step_in * height, step_out) if across else (step_in, step_out * height)
    values = -(-inputs // step_in)
    grid = -(-(outputs // lanes) // step_out)
    target = (card.multiprocessors or 0) * (card.threads_per_multiprocessor // (width * height))
    if not (across and values >= _MOST_VALUES and grid <= target):
        return ()
    wanted = min(-(-target // grid), -(-values // _LEAST_VALUES))
    per_output = max(wanted, -(-values // _MOST_VALUES))
    if per_output <= 1:
        return ()
    lane = 1 if along else width * lanes
    return accumulated * outputs * per_output * lane, 4 * grid
