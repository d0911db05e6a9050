"""Where an ATen operator's memory on CUDA differs from what its meta kernel shows: temporary blocks inside it.

`scratch(func, args, kwargs, out, card)` says which, from `SCRATCH`, a table by the operator's name. A rule is read in
PyTorch's source (2.11 to 2.13) and names its file; what no published measurement bears out is unverified. Start reading
at `call.py`, which has what a rule is given and gives.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from harness.device import scratch_attention as attention
from harness.device import scratch_norms as norms
from harness.device import scratch_sorting as sorting
from harness.device.call import Call, Card, Moment, Moments

__all__ = ["SCRATCH", "Call", "Card", "Moment", "Moments", "Scratch", "scratch"]


class Scratch(NamedTuple):
    """What an operator allocates on CUDA besides its outputs.

    does: one sentence; source: the files of PyTorch that say so; blocks: the rule; row: the kernel in
    profiles/measured.md whose rows bear it out.
    """

    does: str
    source: str
    blocks: Callable[[Call], Moments]
    row: str = "unverified"


def _nothing(call: Call) -> Moments:
    return ()


def _unknown(call: Call) -> Moments:
    return None


_CUDA = "aten/src/ATen/native/cuda/"
_ATTENTION = "aten/src/ATen/native/transformers/cuda/"


def _same(entry: Scratch, *names: str) -> dict[str, Scratch]:
    return dict.fromkeys(names, entry)


_SORTING = {
    "embedding_dense_backward": Scratch(
        "sorts the indices and keeps partial sums of the gradient in fp32, from 3,073 indices on",
        f"{_CUDA}Embedding.cu, {_CUDA}EmbeddingBackwardKernel.cu",
        sorting.embedding_dense_backward,
        "embedding",
    ),
    "sort": Scratch(
        "sorts rows of over 4,096 elements with cub",
        f"{_CUDA}Sort.cpp, {_CUDA}SortStable.cu",
        sorting.sort,
        "sparsemax",
    ),
    "topk": Scratch("counts digits for each block of a long row", f"{_CUDA}TensorTopK.cu", sorting.topk),
    **_same(
        Scratch("sorts the linear indices where it accumulates", f"{_CUDA}Indexing.cu", sorting.index_put),
        *("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"),
    ),
    "multinomial": Scratch(
        "draws noise of the input's size",
        f"aten/src/ATen/native/Distributions.cpp, {_CUDA}MultinomialKernel.cu",
        sorting.multinomial,
    ),
    **_same(
        Scratch("scans one row with cub", f"{_CUDA}ScanUtils.cuh", sorting.cumsum),
        *("cumsum", "cumsum_", "cumprod", "cumprod_"),
    ),
    "repeat_interleave": Scratch(
        "keeps the cumulative sum of the repeats", "aten/src/ATen/native/Repeat.h", sorting.repeat_interleave
    ),
    **_same(
        Scratch(
            "finds with cub how much it returns, which depends on the values", f"{_CUDA}Nonzero.cu", _unknown
        ),
        *("nonzero", "masked_select", "argwhere"),
    ),
    **_same(
        Scratch("sorts with cub, and its results keep the input's size", f"{_CUDA}UniqueCub.cu", _unknown),
        *("_unique", "_unique2", "unique_consecutive", "unique_dim"),
    ),
    **_same(
        Scratch("adds or copies in place", f"{_CUDA}Indexing.cu, {_CUDA}ScatterGatherKernel.cu", _nothing),
        *("index_add", "index_add_", "index_select", "index", "gather"),
        *("scatter", "scatter_", "scatter_add", "scatter_add_"),
    ),
    **_same(
        Scratch("reads the least and the largest value first", f"{_CUDA}SummaryOps.cu", norms.histogram),
        *("histc", "bincount"),
    ),
}

_NORMS = {
    "native_layer_norm": Scratch(
        "copies what is not contiguous", f"{_CUDA}layer_norm_kernel.cu", norms.layer_norm
    ),
    "_fused_rms_norm": Scratch(
        "copies what is not contiguous", f"{_CUDA}layer_norm_kernel.cu", norms.layer_norm
    ),
    "native_layer_norm_backward": Scratch(
        "sums the weight's gradient in parts, for many rows of few features",
        f"{_CUDA}layer_norm_kernel.cu",
        norms.layer_norm_backward,
        "layer_norm",
    ),
    "_fused_rms_norm_backward": Scratch(
        "sums the weight's gradient in parts, for many rows of few features",
        f"{_CUDA}layer_norm_kernel.cu",
        norms.layer_norm_backward,
        "megatron_rms_norm",
    ),
    "native_group_norm": Scratch(
        "fuses weight and statistics for each channel", f"{_CUDA}group_norm_kernel.cu", norms.group_norm
    ),
    "native_group_norm_backward": Scratch(
        "sums over each channel and each group",
        f"{_CUDA}group_norm_kernel.cu",
        norms.group_norm_backward,
        "group_norm",
    ),
    **_same(
        Scratch("copies what is not contiguous", f"{_CUDA}SoftMax.cu", norms.softmax),
        *("_softmax", "_log_softmax"),
    ),
    "_softmax_backward_data": Scratch(
        "multiplies the gradient by the output first",
        f"{_CUDA}SoftMax.cu",
        norms.softmax_backward,
        "softmax",
    ),
    "_log_softmax_backward_data": Scratch(
        "copies what is not contiguous", f"{_CUDA}SoftMax.cu", norms.log_softmax_backward
    ),
    **_same(
        Scratch(
            "runs a layer with its own buffers",
            "aten/src/ATen/native/transformers/transformer.cpp, attention.cpp",
            _unknown,
        ),
        *("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
    ),
    **_same(
        Scratch(
            "asks cuSOLVER or cuFFT for a workspace",
            "aten/src/ATen/native/cuda/linalg/BatchLinearAlgebra.cpp, aten/src/ATen/native/cuda/SpectralOps.cpp",
            _unknown,
        ),
        *(
            "_linalg_svd",
            "_linalg_eigh",
            "linalg_eig",
            "linalg_cholesky_ex",
            "linalg_inv_ex",
            "linalg_lu_factor_ex",
        ),
        *("linalg_qr", "linalg_lstsq", "linalg_ldl_factor_ex", "_linalg_solve_ex", "_linalg_det"),
        *("_fft_r2c", "_fft_c2r", "_fft_c2c"),
    ),
    "_safe_softmax": Scratch(
        "marks what is masked out", "aten/src/ATen/native/transformers/attention.cpp", norms.safe_softmax
    ),
    "logsumexp": Scratch("keeps the exponentials", "aten/src/ATen/native/ReduceOps.cpp", norms.logsumexp),
    **_same(
        Scratch("reduces in place", f"{_CUDA}Loss.cu, {_CUDA}NLLLoss2d.cu", _nothing),
        *("nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward"),
    ),
    **_same(
        Scratch("reduces within a warp or a block", f"{_CUDA}Dropout.cu", _nothing),
        *("native_dropout", "native_dropout_backward"),
    ),
}

_SUMMED = Scratch("stages a reduction over few outputs in global memory", f"{_CUDA}Reduce.cuh", norms.summed)
_REDUCTIONS = {
    "sum": _SUMMED._replace(row="fused_add_rms_norm"),
    **_same(_SUMMED, "mean", "linalg_vector_norm"),
    **_same(
        Scratch("stages a reduction over few outputs in global memory", f"{_CUDA}Reduce.cuh", norms.largest),
        *("amax", "amin"),
    ),
    **_same(
        Scratch("stages a reduction over few outputs in global memory", f"{_CUDA}Reduce.cuh", norms.placed),
        *("argmax", "argmin"),
    ),
    "_foreach_norm": Scratch(
        "keeps a partial norm for each chunk", f"{_CUDA}ForeachReduceOp.cu", norms.foreach_norm
    ),
    **_same(
        Scratch("passes its lists as kernel arguments", f"{_CUDA}MultiTensorApply.cuh", _nothing),
        *("_fused_adam", "_fused_adam_", "_fused_adamw", "_fused_adamw_", "_fused_sgd", "_fused_sgd_"),
        *("_fused_adagrad", "_fused_adagrad_", "_foreach_add_", "_foreach_mul_", "_foreach_lerp_"),
        *("_foreach_addcmul_", "_foreach_addcdiv_", "_foreach_sqrt", "_foreach_div_", "_foreach_copy_"),
    ),
}

_MATRICES = {
    **_same(
        Scratch(
            "copies factors that BLAS cannot read",
            f"{_CUDA}cuBlasCommonArgs.h",
            norms.matrices("self", "mat2"),
        ),
        *("mm", "bmm"),
    ),
    **_same(
        Scratch(
            "copies factors that BLAS cannot read",
            f"{_CUDA}cuBlasCommonArgs.h",
            norms.matrices("mat1", "mat2"),
        ),
        *("addmm", "addmm_", "_addmm_activation"),
    ),
    **_same(
        Scratch(
            "copies factors that BLAS cannot read", f"{_CUDA}Blas.cpp", norms.matrices("batch1", "batch2")
        ),
        *("baddbmm", "baddbmm_"),
    ),
    **_same(
        Scratch("asks cuDNN for a workspace", "aten/src/ATen/native/cudnn/Conv_v8.cpp", _unknown),
        *("convolution", "convolution_backward", "_convolution"),
    ),
    **_same(
        Scratch("lays out pointers for CUTLASS", f"{_CUDA}GroupMM.cu", _unknown),
        *("_grouped_mm", "_scaled_grouped_mm"),
    ),
}

_ATTENTIONS = {
    "_scaled_dot_product_flash_attention": Scratch(
        "splits the keys where there are few queries",
        f"{_ATTENTION}flash_attn/flash_api.cpp",
        attention.flash,
    ),
    "_scaled_dot_product_flash_attention_backward": Scratch(
        "sums the queries' gradient in fp32",
        f"{_ATTENTION}flash_attn/flash_api.cpp",
        attention.flash_backward,
    ),
    "_scaled_dot_product_efficient_attention": Scratch(
        "keeps the output in fp32 where a value is wide", f"{_ATTENTION}attention.cu", attention.efficient
    ),
    "_scaled_dot_product_efficient_attention_backward": Scratch(
        "stages the queries' gradient in fp32",
        f"{_ATTENTION}attention_backward.cu, {_ATTENTION}mem_eff_attention/kernel_backward.h",
        attention.efficient_backward,
    ),
    **_same(
        Scratch("asks cuDNN for a workspace", "aten/src/ATen/native/cudnn/MHA.cpp", _unknown),
        *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
        *("_cudnn_attention_forward", "_cudnn_attention_backward"),
    ),
    **_same(
        Scratch("takes sequences of several lengths", f"{_ATTENTION}attention.cu", _unknown),
        *("_flash_attention_forward", "_flash_attention_backward"),
        *("_efficient_attention_forward", "_efficient_attention_backward"),
    ),
}

_PACKED = {
    "gemm_4bit": Scratch(
        "unpacks the weight and its scales where its own kernels would be slower",
        "bitsandbytes/backends/cuda/ops.py",
        norms.unpacked,
    )
}

SCRATCH: dict[str, Scratch] = {**_SORTING, **_NORMS, **_REDUCTIONS, **_MATRICES, **_ATTENTIONS, **_PACKED}
"""Scratch by the operator's name, without its overload; an operator that is not here is taken to have none."""

NAMESPACES = ("aten", "bitsandbytes")
"""The libraries whose operators are in the table."""


def scratch(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, card: Card
) -> Moments:
    """The temporary blocks of one call: candidates for its most memory-hungry moment.

    args, kwargs, out: as a dispatch mode sees them. Returns () where there are none, and None where they cannot be
    derived: cuDNN's workspaces, sizes that depend on values, and what depends on a number of `card` that is unknown.
    """
    entry = SCRATCH.get(func._schema.name.rpartition("::")[2])
    if entry is None or func.namespace not in NAMESPACES:
        return ()
    tensors = torch.utils._pytree.tree_leaves((args, kwargs, out))
    if any(isinstance(each, torch.Tensor) and _symbolic(each) for each in tensors):
        return None
    return entry.blocks(Call(func, args, kwargs, out, card))


def _symbolic(tensor: torch.Tensor) -> bool:
    """Whether a tensor's size depends on values that nobody has computed."""
    return any(not isinstance(size, int) for size in tensor.shape)
