"""Operators that PyTorch computes otherwise on a GPU: registered for the card while it is rehearsed.

`harness.device.kernels` has those of a build with CUDA. Here are those for which C++ would ask a tensor for its device,
and get its own name for the card.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.device.call import Card
from harness.device.kernels import installed
from harness.rehearsal import card_autocast
from harness.rehearsal.card import in_python
from harness.rehearsal.card_memory import current

_aten = torch.ops.aten
_ON_CARD = "AutogradCUDA", "CUDA"
_ON_HOST = "AutogradCPU", "CPU"


def _to(
    self: torch.Tensor,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: Any = None,
) -> torch.Tensor:
    """`Tensor.to`: the tensor itself where nothing changes, as in aten/src/ATen/native/TensorConversions.cpp."""
    device = self.device if device is None else in_python(device)
    same_format = memory_format in (None, torch.preserve_format) or self.is_contiguous(
        memory_format=memory_format
    )
    same = dtype in (None, self.dtype) and layout in (None, self.layout) and device == self.device
    if same and same_format and not copy:
        return self
    options = {"layout": layout, "pin_memory": pin_memory, "non_blocking": non_blocking}
    copied: torch.Tensor = _aten._to_copy(
        self, dtype=dtype or self.dtype, device=device, memory_format=memory_format, **options
    )
    return copied


def _to_device(
    self: torch.Tensor,
    device: Any,
    dtype: Any,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: Any = None,
) -> torch.Tensor:
    """As `_to`."""
    return _to(
        self, dtype=dtype, device=device, non_blocking=non_blocking, copy=copy, memory_format=memory_format
    )


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """One kernel that returns its mask as booleans: is_fused_kernel_acceptable of aten/src/ATen/native/Dropout.cpp."""
    if not train or p == 0 or not input.numel():
        return input
    if p == 1:
        return input * torch.zeros((), dtype=input.dtype, device=input.device)
    result: torch.Tensor = _aten.native_dropout(input, p, train)[0]
    return result


def _in_one_kernel(operator: Any) -> Callable[..., torch.Tensor]:
    """A softmax, which is one kernel from fp16 to fp32: aten/src/ATen/native/SoftMax.cpp."""

    def kernel(self: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        fused = self.dtype == torch.float16 and dtype == torch.float32
        result: torch.Tensor = operator(self if fused or dtype is None else self.to(dtype), dim, fused)
        return result

    return kernel


_BY_DEVICE: dict[str, Callable[..., Any]] = {
    "dropout": _dropout,
    "softmax.int": _in_one_kernel(_aten._softmax),
    "log_softmax.int": _in_one_kernel(_aten._log_softmax),
}


_OTHERWISE = (
    *("lstm.input", "lstm.data", "gru.input", "gru.data", "rnn_tanh.input", "rnn_relu.input", "batch_norm"),
    *("ctc_loss.Tensor", "ctc_loss.IntList", "grid_sampler", "lstm_cell", "gru_cell"),
)
"""Operators that a GPU may compute by a library of its own, whose memory no rule knows: `NOT_COVERED` says which."""


def _noting(name: str) -> Callable[..., Any]:
    """The operator as elsewhere; the card's memory notes that it is unknown."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(_aten, packet), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        current().unknown[packet] = None
        return operator.decompose(*args, **kwargs)

    return kernel


@contextmanager
def registered(card: Card) -> Iterator[None]:
    """Register them for `card` in this context."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            # it replaces torch's own
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, kernel in card_autocast.kernels():
                library.impl(name, kernel, card_autocast.KEY, allow_override=True)
        for key in (*_ON_CARD, *_ON_HOST):
            library.impl("to.dtype_layout", _to, key)
            library.impl("to.device", _to_device, key)
        for key in _ON_CARD:
            for name, kernel in _BY_DEVICE.items():
                library.impl(name, kernel, key)
            for name in _OTHERWISE:
                library.impl(name, _noting(name), key)
        with installed(card):
            yield
    finally:
        library._destroy()
        card_autocast.clear()
