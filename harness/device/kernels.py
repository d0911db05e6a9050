"""What CUDA runs for a composite operator where a build of PyTorch without CUDA runs something else.

ATen's C++ decomposes composite operators, and asks the tensor for its device where CUDA differs, so that a fake tensor
on `cuda` takes CUDA's branch by itself: `dropout`, `_weight_norm`, `max_pool1d`, half-precision `softmax`. Left are the
branches that ask which kernels a build has. In `installed(card)`:

- `_fused_rms_norm` has a CUDA kernel, so that `rms_norm` keeps it whole and autograd saves input, weight and 1/rms
  (aten/src/ATen/native/layer_norm.cpp, rms_norm_symint; native_functions.yaml).
- `scaled_dot_product_attention` takes the kernel that the card would (aten/src/ATen/native/transformers/attention.cpp).

Under `torch.inference_mode` an operator reaches a dispatch mode before it is decomposed: the mode calls `KERNELS`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from harness.device.attention_choice import Attention, choose_backend
from harness.device.call import Card

_aten = torch.ops.aten

NOT_COVERED = {
    "batch_norm": "cuDNN's reserve is of a size that only cuDNN knows (Normalization.cpp, _batch_norm_impl_index)",
    "lstm": "cuDNN's reserve and workspace are of sizes that only cuDNN knows (RNN.cpp, use_cudnn)",
    "gru": "as lstm",
    "rnn_tanh": "as lstm",
    "rnn_relu": "as lstm",
    "lstm_cell": "one fused kernel on CUDA, which has no meta kernel in every release (RNN.cpp, CellOp)",
    "gru_cell": "as lstm_cell",
    "ctc_loss": "cuDNN where targets are on the host and short (LossCTC.cpp, _use_cudnn_ctc_loss)",
    "grid_sampler": "cuDNN for bilinear sampling with aligned corners (GridSampler.cpp, cond_cudnn_grid_sampler)",
    "conv1d, conv2d, conv3d": "`convolution` is one operator on both; cuDNN's workspace is a gap of its scratch",
    "linalg_svd, linalg_eigh": "cuSOLVER alone knows the size of its workspaces (linalg/BatchLinearAlgebraLib.cpp)",
    "sparse and nested tensors": "cuSPARSE and per-sample kernels; a rehearsal has dense tensors",
}
"""Composite operators whose CUDA branch is not here, and why.

The list is from reading the sources, not from an exhaustive search: others may ask a build for what it has.
"""


def rms_norm_outputs(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """The normalised input and 1/rms in fp32 for each row: _fused_rms_norm_cuda of native/cuda/layer_norm_kernel.cu."""
    rows = (*x.shape[: x.dim() - len(normalized_shape)], *(1 for _ in normalized_shape))
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(rows, dtype=kept)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    card: Card,
) -> Tensor:
    """`scaled_dot_product_attention` as CUDA takes it apart: tensors of (batch, heads, length, features)."""
    if 0 in (query.numel(), key.numel(), value.numel()):
        empty = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        return empty + (query.sum() + key.sum() + value.sum()) * 0
    call = Attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    backend = choose_backend(call, card)
    mask = _additive(attn_mask, query.dtype)
    run = {"flash": _flash, "efficient": _efficient, "cudnn": _cudnn, "math": _math}[backend]
    return run(call, mask, scale)


def _flash(call: Attention, mask: Tensor | None, scale: float | None) -> Tensor:
    features = call.query.shape[-1]
    padded = (_padded(each) for each in call.tensors)
    scale = scale if scale is not None else 1 / sqrt(features)
    outputs = _aten._scaled_dot_product_flash_attention(
        *padded, call.dropout, call.causal, False, scale=scale
    )
    out: Tensor = outputs[0]
    return out if out.shape[-1] == features else out.narrow(-1, 0, features)


def _efficient(call: Attention, mask: Tensor | None, scale: float | None) -> Tensor:
    bias = None if mask is None else _expanded(mask, call.query, call.key)
    outputs = _aten._scaled_dot_product_efficient_attention(
        *call.tensors, bias, call.trained, call.dropout, call.causal, scale=scale
    )
    out: Tensor = outputs[0]
    return out


def _cudnn(call: Attention, mask: Tensor | None, scale: float | None) -> Tensor:
    outputs = _aten._scaled_dot_product_cudnn_attention(
        *call.tensors, mask, call.trained, call.dropout, call.causal, False, scale=scale
    )
    out: Tensor = outputs[0]
    return out


def _math(call: Attention, mask: Tensor | None, scale: float | None) -> Tensor:
    outputs = _aten._scaled_dot_product_attention_math(
        *call.tensors, mask, call.dropout, call.causal, None, scale=scale, enable_gqa=call.shares_heads
    )
    out: Tensor = outputs[0]
    return out


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask as one to add: 0 where it is true (convert_boolean_attn_mask)."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(-inf, dtype=dtype, device=mask.device))


def _padded(tensor: Tensor) -> Tensor:
    """Features padded to a multiple of 8, as the flash kernel wants them (pad_last_dim)."""
    return tensor if tensor.shape[-1] % 8 == 0 else F.pad(tensor, (0, 8 - tensor.shape[-1] % 8))


def _expanded(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask for every head, its rows at multiples of 8 elements (preprocess_mask)."""
    aligned = mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1])
    if not aligned:
        last = mask.shape[-1]
        mask = F.pad(mask, (0, 8 - last % 8)).narrow(-1, 0, last)
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


KERNELS: dict[OpOverload, Callable[..., Any]] = {_aten.scaled_dot_product_attention.default: attention}
"""What runs on CUDA in place of an operator's own decomposition; each takes the operator's arguments and `card=`."""


WHOLE = ("silu_backward", "mish_backward")
"""Operators with a kernel on CPU and on CUDA, which a build without CUDA takes apart for a tensor on `cuda`
(CompositeImplicitAutograd in native_functions.yaml)."""


def _like_input(grad: Tensor, input: Tensor) -> Tensor:
    return torch.empty_like(input)


@contextmanager
def installed(card: Card) -> Iterator[None]:
    """Run CUDA's kernels for tensors on `cuda`, as `card` would choose them."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for func, kernel in KERNELS.items():
            library.impl(func, _on(kernel, card), "AutogradCUDA")
            library.impl(func, _on(kernel, card), "CUDA")
        library.impl("_fused_rms_norm", rms_norm_outputs, "CUDA")
        for name in WHOLE:
            library.impl(name, _like_input, "CUDA")
        yield
    finally:
        library._destroy()


def _on(kernel: Callable[..., Any], card: Card) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return kernel(*args, card=card, **kwargs)

    return run
