"""Which kernel `scaled_dot_product_attention` runs on CUDA.

From aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and sdp_utils_cpp.h of PyTorch 2.13, for dense tensors; 2.11
and 2.12 are taken to be the same. From 2.14 on, the efficient kernel shares heads and checks offsets, and cuDNN takes
256 features; neither is here. What cuDNN does with 129 to 256 features before that is not derived: it is passed over,
but for 192 with values of 128.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from harness.device.call import Card

Backend = Literal["flash", "efficient", "cudnn", "math"]

_HALF = (torch.float16, torch.bfloat16)
_NAMES: dict[int, Backend] = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
_DEFAULT: tuple[Backend, ...] = ("flash", "efficient", "math", "cudnn")


class Attention(NamedTuple):
    """The arguments of one call: tensors of (batch, heads, length, features)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    shares_heads: bool = False
    """enable_gqa."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.key, self.value

    @property
    def trained(self) -> bool:
        """Whether a backward will follow: input_requires_grad."""
        return torch.is_grad_enabled() and any(each.requires_grad for each in self.tensors)


Rule = Callable[[Attention, Card], bool]


def choose_backend(call: Attention, card: Card) -> Backend:
    """The kernel that runs, by what `torch.nn.attention.sdpa_kernel` and `torch.backends.cuda` allow at present.

    Raises RuntimeError where no allowed kernel can take the call, as torch does.
    """
    return choose_among(call, card, allowed(), order(card))


def choose_among(
    call: Attention, card: Card, among: Sequence[Backend], ordered: Sequence[Backend]
) -> Backend:
    """The first of `ordered` that is in `among` and can take the call."""
    for backend in ordered:
        if backend in among and all(rule(call, card) for rule in _RULES[backend]):
            return backend
    raise RuntimeError("No available kernel. Aborting execution.")


def allowed() -> tuple[Backend, ...]:
    """The kernels that are not switched off."""
    flags = torch.backends.cuda
    on: dict[Backend, Callable[[], bool]] = {
        "flash": flags.flash_sdp_enabled,
        "efficient": flags.mem_efficient_sdp_enabled,
        "cudnn": flags.cudnn_sdp_enabled,
        "math": flags.math_sdp_enabled,
    }
    return tuple(backend for backend, enabled in on.items() if enabled())


def order(card: Card) -> tuple[Backend, ...]:
    """The order in which kernels are tried: the user's, or flash first, or cuDNN first where the card prefers it."""
    given = tuple(_NAMES[each] for each in torch._C._get_sdp_priority_order() if each in _NAMES)
    if given != _DEFAULT or not prefers_cudnn(card):
        return given
    return "cudnn", "flash", "efficient", "math"


def prefers_cudnn(card: Card) -> bool:
    """Capability 9.0, 10.0 and 10.3 with cuDNN from 9.15.1 on, unless TORCH_CUDNN_SDPA_DEPRIORITIZED is 1."""
    if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        return False
    return card.cudnn > 91500 and card.version[0] in (9, 10) and card.version[1] in (0, 3)


def _four_axes(call: Attention, card: Card) -> bool:
    return all(each.dim() == 4 for each in call.tensors)


def _same_batch(call: Attention, card: Card) -> bool:
    return len({each.shape[0] for each in call.tensors}) == 1


def _heads(call: Attention) -> tuple[int, ...]:
    return tuple(each.shape[-3] for each in call.tensors)


def _equal_heads(call: Attention, card: Card) -> bool:
    return len(set(_heads(call))) == 1


def _flash_heads(call: Attention, card: Card) -> bool:
    query, key, value = _heads(call)
    return key == value and query % key == 0 if call.shares_heads else _equal_heads(call, card)


def _cudnn_heads(call: Attention, card: Card) -> bool:
    query, key, value = _heads(call)
    return query % key == 0 and query % value == 0 if call.shares_heads else _equal_heads(call, card)


def _not_empty(call: Attention, card: Card) -> bool:
    return call.query.shape[-2] > 0 and call.key.shape[-2] > 0


def _mask_in_place(call: Attention) -> bool:
    return call.mask is None or call.mask.stride(-1) == 1


def _contiguous_features(call: Attention, card: Card) -> bool:
    return all(each.stride(-1) == 1 for each in call.tensors) and _mask_in_place(call)


def _contiguous_or_single(call: Attention, card: Card) -> bool:
    rows = all(each.stride(-1) == 1 for each in call.tensors) or call.query.shape[-1] == 1
    return rows and _mask_in_place(call)


def _from_8_0(call: Attention, card: Card) -> bool:
    return (8, 0) <= card.version <= (12, 1)


def _from_5_0(call: Attention, card: Card) -> bool:
    return (5, 0) <= card.version <= (12, 1)


def _one_type(call: Attention, types: Sequence[torch.dtype]) -> bool:
    return call.query.dtype in types and len({each.dtype for each in call.tensors}) == 1


def _low_precision(call: Attention, card: Card) -> bool:
    return _one_type(call, _HALF if card.version >= (8, 0) else _HALF[:1])


def _efficient_types(call: Attention, card: Card) -> bool:
    half = _HALF if card.version >= (8, 0) else _HALF[:1]
    return _one_type(call, (*half, torch.float32))


def _no_mask(call: Attention, card: Card) -> bool:
    return call.mask is None


def _flash_features(call: Attention, card: Card) -> bool:
    sizes = {each.shape[-1] for each in call.tensors}
    return len(sizes) == 1 and max(sizes) <= 256


def _flash_trains(call: Attention, card: Card) -> bool:
    """193 to 224 features, and 225 to 256 with dropout, have no backward on cards of little shared memory."""
    small = (8, 6) <= card.version <= (8, 9) or (12, 0) <= card.version <= (12, 1)
    features = call.query.shape[-1]
    return not (small and call.trained and (192 < features <= 224 or (features > 224 and call.dropout > 0)))


def _square_if_causal(call: Attention, card: Card) -> bool:
    return not call.causal or call.query.shape[-2] == call.key.shape[-2]


def _aligned_features(call: Attention, card: Card) -> bool:
    """Features must fill a load of a matrix multiply: minimum_gemm_alignment."""
    half = call.query.dtype in _HALF
    step = 4 if card.version >= (8, 0) else 1
    if card.version >= (8, 0) or (card.version >= (7, 0) and half):
        step = max(step, 128 // (16 if half else 32))
    keys, values = call.query.shape[-1], call.value.shape[-1]
    equal = call.key.shape[-1] == keys
    return equal and keys > 0 and values > 0 and keys % step == 0 and values % step == 0


def _cudnn_mask(call: Attention, card: Card) -> bool:
    mask = call.mask
    if mask is None:
        return True
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    batch, heads, queries, _ = call.query.shape
    sizes: tuple[Any, ...] = (batch, heads, queries, call.key.shape[-2])
    return all(own in (1, size) for own, size in zip(mask.shape, sizes[-mask.dim() :], strict=True))


def _cudnn_dropout(call: Attention, card: Card) -> bool:
    broken = 91100 < card.cudnn < 91400 and call.dropout > 0
    return (call.dropout * 16).is_integer() and not broken


def _cudnn_shapes(call: Attention, card: Card) -> bool:
    batch, heads, queries, features = call.query.shape
    keys, values = call.key.shape[-2], call.value.shape[-1]
    datacentre = card.version == (9, 0) or card.version[0] == 10
    most = 192 if datacentre and card.cudnn >= 91100 and (features, values) == (192, 128) else 128
    fits = max(batch, heads) <= 65535 and max(features, values) <= most
    aligned = features % 8 == 0 and values % 8 == 0
    return fits and aligned and keys != 1 and not (call.dropout > 0 and queries == 1)


def _cudnn_version(call: Attention, card: Card) -> bool:
    return card.cudnn >= 90000


def _not_deterministic(call: Attention, card: Card) -> bool:
    strict = torch.are_deterministic_algorithms_enabled()
    return not strict or torch.is_deterministic_algorithms_warn_only_enabled()


_RULES: dict[Backend, tuple[Rule, ...]] = {
    "flash": (
        *(_four_axes, _no_mask, _flash_features, _from_8_0, _flash_trains, _square_if_causal, _low_precision),
        *(_same_batch, _flash_heads, _not_empty, _contiguous_or_single),
    ),
    "efficient": (
        *(_from_5_0, _four_axes, _aligned_features, _not_empty, _contiguous_features),
        *(_same_batch, _equal_heads, _efficient_types),
    ),
    "cudnn": (
        *(_cudnn_version, _four_axes, _not_deterministic, _low_precision, _cudnn_mask, _from_8_0),
        *(_cudnn_dropout, _not_empty, _contiguous_or_single, _same_batch, _cudnn_heads, _cudnn_shapes),
    ),
    "math": (),
}
