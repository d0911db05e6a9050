"""Scratch of normalisations, losses and reductions on CUDA."""

from math import prod

import torch

from harness.device.call import Call, Moment, Moments, accumulated, copies, nbytes, once
from harness.device.reduction import axes, staging

_LOW = (torch.float16, torch.bfloat16)


def layer_norm(call: Call) -> Moments:
    """None, but for copies of what is not contiguous: ATen/native/cuda/layer_norm_kernel.cu."""
    return once(*copies(call["input"], call["weight"], call.get("bias")))


def layer_norm_backward(call: Call) -> Moments:
    """Over 65,536 rows of few features: partial gradients of weight and bias, summed into new tensors.

    ATen/native/cuda/layer_norm_kernel.cu, LaunchGammaBetaBackwardCUDAKernel; RMS norm shares it, without the bias.
    Otherwise the gradients are summed in place.
    """
    grad, x, weight = call.get("grad_out"), call["input"], call["weight"]
    copied = copies(grad, x, weight, call.get("bias"))
    width = prod(call["normalized_shape"])
    count = x.numel() // max(width, 1)
    wanted = [*call["output_mask"][1:]]
    if count <= 64 * 1024 or not any(wanted):
        return once(*copied)
    if call.card.multiprocessors is None:
        return None
    if width // 32 >= call.card.multiprocessors // 2:
        return once(*copied)
    across = -(-width // 32)
    partial = min(32 * 1024 // across, -(-count // 32))
    size = x.element_size()
    table = partial * width
    reduced = staging(
        axes((partial, width), (width, 1), (0,)),
        element=size,
        accumulated=accumulated(x.dtype),
        card=call.card,
    )
    if reduced is None:
        return None
    tables = sum(wanted) * (table * size,)
    return (Moment((*copied, *tables, width * size, *reduced)),)


def group_norm(call: Call) -> Moments:
    """A scale and a shift for each channel of each sample: ATen/native/cuda/group_norm_kernel.cu."""
    x = call["input"]
    affine = call["weight"] is not None or call["bias"] is not None
    row = call["N"] * call["C"] * accumulated(x.dtype)
    fused = 2 * (row,) if affine and call["HxW"] > 1 else ()
    return once(*copies(x, call["weight"], call["bias"]), *fused)


def group_norm_backward(call: Call) -> Moments:
    """Sums over each channel, and over each group: ATen/native/cuda/group_norm_kernel.cu."""
    x, size = call["input"], accumulated(call["input"].dtype)
    channel = call["N"] * call["C"] * size
    group = call["N"] * call["group"] * size
    blocks = [channel, channel]
    if call["output_mask"][0]:
        blocks += [group, group]
        if call["HxW"] > 1 and call["weight"] is not None:
            blocks.append(channel)
    return once(*copies(call["grad_out"], x, call["weight"]), *blocks)


def softmax(call: Call) -> Moments:
    """None, but for a copy of an input that is not contiguous: ATen/native/cuda/SoftMax.cu."""
    return once(*copies(call["self"]))


def log_softmax_backward(call: Call) -> Moments:
    """None, but for copies of what is not contiguous: ATen/native/cuda/SoftMax.cu."""
    return once(*copies(call["grad_output"], call["output"]))


def softmax_backward(call: Call) -> Moments:
    """The gradient times the output: softmax_backward_cuda_out of ATen/native/cuda/SoftMax.cu."""
    return once(nbytes(call["grad_output"]), *copies(call["output"]))


def safe_softmax(call: Call) -> Moments:
    """A mask of the input's shape and one of its rows: ATen/native/transformers/attention.cpp, _safe_softmax."""
    x = call["self"]
    return once(x.numel(), x.numel() // max(x.shape[call["dim"]], 1), call.outs[0].element_size())


def logsumexp(call: Call) -> Moments:
    """The exponentials, and the largest element of each row: ATen/native/ReduceOps.cpp."""
    out = call.outs[0]
    return once(call["self"].numel() * out.element_size(), out.numel() * out.element_size())


def _dims(call: Call) -> tuple[int, ...]:
    x = call["self"]
    given = call.get("dim")
    if given is None or given == []:
        return tuple(range(x.dim()))
    return tuple(each % max(x.dim(), 1) for each in ([given] if isinstance(given, int) else given))


def _reduction(call: Call, *, pair: int = 0, casts: bool = True) -> Moments:
    """A copy in the type of the result where they differ, and what Reduce.cuh stages in global memory."""
    x, out = call["self"], call.outs[0]
    if x.dim() == 0 or x.numel() == 0:
        return ()
    cast = casts and x.dtype != out.dtype and not (x.dtype in _LOW and out.dtype == torch.float32)
    read = out.dtype if cast else x.dtype
    blocks = staging(
        axes(x.shape, x.stride(), _dims(call)),
        element=read.itemsize,
        accumulated=pair or accumulated(read),
        card=call.card,
        offset=0 if cast else int(x.storage_offset()),
    )
    return None if blocks is None else once(x.numel() * read.itemsize if cast else 0, *blocks)


def summed(call: Call) -> Moments:
    """A sum over rows is split over blocks that meet in global memory; integers and masks are first copied to int64.

    A mean and a norm are alike. ATen/native/cuda/Reduce.cuh, ReduceSumProdKernel.cu and ReduceMomentKernel.cu;
    ATen/native/ReduceOpsUtils.h (make_reduction_from_out_ty).
    """
    return _reduction(call)


def largest(call: Call) -> Moments:
    """As a sum, in the input's own type: ATen/native/cuda/ReduceMaxValuesKernel.cu."""
    return _reduction(call, pair=call["self"].element_size(), casts=False)


def placed(call: Call) -> Moments:
    """As a sum, of pairs of a value and its place, 16 bytes: ATen/native/cuda/ReduceArgMaxKernel.cu."""
    return _reduction(call, pair=16, casts=False)


def foreach_norm(call: Call) -> Moments:
    """A partial norm for each 65,536 elements of the longest tensor, times the tensors: ForeachReduceOp.cu."""
    tensors = call["self"]
    chunks = max((-(-each.numel() // 65536) for each in tensors), default=0)
    return once(len(tensors) * chunks * accumulated(tensors[0].dtype) if tensors else 0)


def histogram(call: Call) -> Moments:
    """The least and the largest value: ATen/native/cuda/SummaryOps.cu."""
    size = call["self"].element_size()
    return once(size, size)


def matrices(*names: str) -> "Matrices":
    return Matrices(names)


class Matrices:
    """Copies of the factors that BLAS cannot read in place: ATen/native/cuda/cuBlasCommonArgs.h and Blas.cpp."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, call: Call) -> Moments:
        return once(*(nbytes(each) for each in (call[name] for name in self.names) if not readable(each)))


UNPACKED_ROWS = 1536
"""Above so many rows bitsandbytes always unpacks a weight of 4 bits (backends/cuda/ops.py); below, it asks the card."""


def unpacked(call: Call) -> Moments:
    """A weight of 4 bits and its fp32 scales, before and after their mean is added."""
    taken, packed, scales = call["A"], prod(call["shapeB"]), call["absmax_8bit"]
    if taken.numel() // taken.shape[-1] <= UNPACKED_ROWS and taken.shape[-1] % call["blocksize"] == 0:
        return None
    nested = () if scales is None else (4 * scales.numel(), 4 * scales.numel())
    return once(*nested, packed * taken.element_size())


def readable(matrix: torch.Tensor) -> bool:
    """Whether one of a matrix's last two axes is contiguous and the other's rows do not overlap."""
    (height, width), (down, right) = matrix.shape[-2:], matrix.stride()[-2:]
    if matrix.dim() == 3 and 0 in (down, right):
        return False
    return (down == 1 and right >= max(1, height)) or (right == 1 and down >= max(1, width))
