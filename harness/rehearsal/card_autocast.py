"""`torch.autocast("cuda")` on the card: which operators cast their arguments, and the casts that it keeps.

PyTorch's own code would ask C++ whether a tensor is on a GPU. The policies are those of aten/src/ATen/autocast_mode.h
and autocast_mode.cpp in torch 2.13: a cast of a float32 leaf that needs a gradient is kept until autocast ends.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from harness.rehearsal.card import CARD

KEY = "AutocastCUDA"

LOWER = (
    *(
        "_convolution",
        "_convolution.deprecated",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_tbc",
        "conv_transpose1d",
    ),
    *(
        "conv_transpose2d.input",
        "conv_transpose3d.input",
        "convolution",
        "prelu",
        "addmm",
        "addmv",
        "addr",
        "matmul",
    ),
    *("einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul"),
    *(
        "linalg_multi_dot",
        "lstm_cell",
        "gru_cell",
        "rnn_tanh_cell",
        "rnn_relu_cell",
        "scaled_dot_product_attention",
    ),
)
"""Operators that take the lower precision."""

FP32 = (
    *(
        "acos",
        "asin",
        "cosh",
        "erfinv",
        "exp",
        "expm1",
        "log",
        "log10",
        "log2",
        "log1p",
        "reciprocal",
        "rsqrt",
        "sinh",
    ),
    *(
        "tan",
        "pow.Tensor_Scalar",
        "pow.Tensor_Tensor",
        "pow.Scalar",
        "softplus",
        "layer_norm",
        "native_layer_norm",
    ),
    *("rms_norm", "group_norm", "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss", "nll_loss"),
    *("nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss"),
    *(
        "margin_ranking_loss",
        "multilabel_margin_loss",
        "soft_margin_loss",
        "triplet_margin_loss",
        "multi_margin_loss",
    ),
    *("binary_cross_entropy_with_logits", "dist", "cdist", "renorm", "logsumexp"),
)
"""Operators that take float32."""

FP32_RESULT = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm"),
    *("linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList"),
)
"""Operators that compute in float32 by their own argument `dtype`."""

WIDEST = (
    *(
        "addcdiv",
        "addcmul",
        "atan2",
        "bilinear",
        "cross",
        "dot",
        "vdot",
        "grid_sampler",
        "index_put",
        "tensordot",
    ),
    "scatter_add",
)
"""Operators that take the widest type among their arguments."""

Kernel = Callable[..., Any]


_kept: Any = WeakIdKeyDictionary()
"""The casts that autocast keeps until it ends."""


def clear() -> None:
    """Forget the casts that are kept."""
    _kept.clear()


def kernels() -> Iterator[tuple[str, Kernel]]:
    """The name of each operator, and what it does under autocast."""
    for names, policy in ((LOWER, _lower), (FP32, _fp32), (FP32_RESULT, _fp32_result), (WIDEST, _widest)):
        for name in names:
            packet, _, overload = name.partition(".")
            yield name, policy(getattr(getattr(torch.ops.aten, packet), overload or "default"))


def _lower(operator: Any) -> Kernel:
    return lambda *args, **kwargs: _called(operator, args, kwargs, torch.get_autocast_dtype("cuda"))


def _fp32(operator: Any) -> Kernel:
    return lambda *args, **kwargs: _called(operator, args, kwargs, torch.float32)


def _widest(operator: Any) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("cuda")
        for tensor in filter(_eligible, tree_leaves((args, kwargs))):
            dtype = torch.promote_types(dtype, tensor.dtype)
        return _called(operator, args, kwargs, dtype)

    return kernel


def _fp32_result(operator: Any) -> Kernel:
    names = [argument.name for argument in operator._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if _eligible(args[0]) and "dtype" not in names[: len(args)] and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return _called(operator, args, kwargs, None)

    return kernel


def _called(operator: Any, args: Any, kwargs: Any, dtype: torch.dtype | None) -> Any:
    """The result of `operator` without autocast, with its eligible tensors as `dtype`, if there is one."""
    if dtype is not None:
        args, kwargs = tree_map(lambda leaf: _cast(leaf, dtype), (args, kwargs))
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)):
        return operator(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not _eligible(value) or value.dtype == dtype:
        return value
    leaf = value.is_leaf and value.requires_grad and not value._is_view()
    lower = dtype == torch.get_autocast_dtype("cuda") and value.dtype == torch.float32
    if not (leaf and lower and torch.is_autocast_cache_enabled()):
        return value.to(dtype)
    if value not in _kept:
        _kept[value] = value.to(dtype)
    return _kept[value]


def _eligible(value: Any) -> bool:
    """Whether autocast casts `value`: a floating-point tensor on the card, but no float64."""
    on_card = isinstance(value, torch.Tensor) and value.device == CARD
    return on_card and value.is_floating_point() and value.dtype != torch.float64


def clearing(original: Callable[[], None]) -> Callable[[], None]:
    """`torch.clear_autocast_cache`, which autocast calls as it ends: it clears these casts too."""

    def stand_in() -> None:
        original()
        clear()

    return stand_in
