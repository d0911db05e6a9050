"""Operators that PyTorch computes otherwise on a GPU: registered for the card while it is rehearsed.

`Tensor.to` is among them, as C++ would compare the device with its own name for the card.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.device.kernels import KERNELS
from harness.rehearsal import card_autocast
from harness.rehearsal.card import in_python

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
    kept = memory_format in (None, torch.preserve_format) or self.is_contiguous(memory_format=memory_format)
    if dtype in (None, self.dtype) and layout in (None, self.layout) and device == self.device and kept and not copy:
        return self
    options = {"layout": layout, "pin_memory": pin_memory, "non_blocking": non_blocking}
    return torch.ops.aten._to_copy(
        self, dtype=dtype or self.dtype, device=device, memory_format=memory_format, **options
    )


@contextmanager
def registered() -> Iterator[None]:
    """Register them in this context."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # it replaces torch's own
            for name, kernel in card_autocast.kernels():
                library.impl(name, kernel, card_autocast.KEY, allow_override=True)
        for key in (*_ON_CARD, *_ON_HOST):
            library.impl("to.dtype_layout", _to, key)
        for name, kernel in KERNELS.items():
            for key in _ON_CARD:
                library.impl(name, kernel, key)
        yield
    finally:
        library._destroy()
        card_autocast.clear()
