"""What autograd does in place on a GPU, and not for fake tensors: C++ asks whether a tensor is of a subclass.

Here such an operator returns its first argument, as its in-place form would.
"""

import sys
from typing import Any

import torch

from harness.ledger.modules import in_backward

_aten = torch.ops.aten

SCATTERED = {
    "GatherBackward0": _aten.scatter_add.default,
    "IndexSelectBackward0": _aten.index_add.default,
    "IndexBackward0": _aten.index_put.default,
    "MaskedSelectBackward0": _aten.masked_scatter.default,
    **dict.fromkeys(
        (
            *("MaxBackward0", "MinBackward0", "MedianBackward1", "ModeBackward0", "KthvalueBackward0"),
            *("SortBackward0", "SortBackward1", "TopkBackward0"),
        ),
        _aten.scatter.src,
    ),
}
"""Operators into a new tensor of zeros, by the node that calls them: gather_backward, index_select_backward and others
of torch/csrc/autograd/FunctionsManual.cpp."""

WRITES = frozenset({_aten.add.Tensor, *SCATTERED.values()})
"""Operators that autograd may call in place."""


def in_place(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether autograd would call the in-place form of `func` here."""
    if func not in WRITES or not in_backward() or torch.is_grad_enabled():
        return False
    if func is _aten.add.Tensor:
        return not kwargs and _accumulates(*args)
    node = torch._C._current_autograd_node()
    return node is not None and SCATTERED.get(node.name()) is func


def _accumulates(earlier: Any, new: Any) -> bool:
    """Whether `earlier` is the sum so far of a node's gradients, and nothing else has it: can_accumulate_inplace of
    torch/csrc/autograd/input_buffer.cpp.

    Nothing else has it where no more refers to it than to `new`, which comes by the same way.
    """
    if not isinstance(earlier, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    alike = earlier.shape == new.shape and earlier.dtype == new.dtype and earlier.device == new.device
    storage = earlier.untyped_storage()
    fills_its_own = (
        torch._C._storage_Use_Count(storage._cdata) == _OF_ITS_OWN and storage.nbytes() == earlier.nbytes
    )
    use_count: Any = torch.Tensor._use_count  # type: ignore[attr-defined]
    counted = use_count(earlier) <= use_count(new) and sys.getrefcount(earlier) <= sys.getrefcount(new)
    return alike and fills_its_own and counted


_OF_ITS_OWN = 2
"""References to the storage of one tensor: the tensor's, and that of the object that asks."""
