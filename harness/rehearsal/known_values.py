"""The values of small integer and boolean tensors, really computed beside their fakes.

A fake tensor has a shape and no value, yet models and engines ask: is this mask all ones, do these positions start
anew? The answer decides which branch runs, and so the bytes. Positions, masks and counters follow from shapes alone,
so they are computed; what follows from weights is unknown, and what is asked of it is answered by `UNKNOWN`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from harness.ledger.log import COLLECTIVES
from harness.ledger.tensors import shared, tensors_in

LARGEST = 2**20
"""Elements of the largest tensor that is computed: masks of [B, T] are far below it, [T, T] is never asked for."""

UNKNOWN: dict[bool, Any] = {True: 1.0, False: 0}
"""What an unknown number (a loss, a norm, a token that a model chose) is taken to be, by whether it has a fraction."""

_DEVICE = torch.ops.prim.device.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default


class Values(TorchDispatchMode):
    """Outside a FakeTensorMode: computes what can be known, and answers where a value is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._known: Any = WeakIdKeyDictionary()  # from a fake tensor to a real one with its values

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types and shared(types):
            return NotImplemented
        if func is _DEVICE:
            return args[0].fake_device
        if func is _ITEM:
            return self._item(args[0])
        if func is _EQUAL:
            return self._equal(*args)
        out = func(*args, **kwargs)
        if func.namespace in COLLECTIVES:
            self._forget(args)  # what the others would have sent
        elif not self._compute(func, args, kwargs, out) and func._schema.is_mutable:
            self._forget(list(_written(func, args, kwargs)))
        return out

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """`tensor` with its values; None where they are unknown."""
        known: torch.Tensor | None = self._known.get(tensor) if isinstance(tensor, FakeTensor) else tensor
        return known

    def _item(self, tensor: torch.Tensor) -> Any:
        known = self.value(tensor)
        if known is not None:
            with no_dispatch():
                return known.item()
        return False if tensor.dtype == torch.bool else UNKNOWN[tensor.dtype.is_floating_point]

    def _equal(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        one, other = self.value(left), self.value(right)
        if one is None or other is None:
            return left.shape == right.shape
        with no_dispatch():
            return torch.equal(one, other)

    def _compute(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Do the same with values, where all that `func` took is known and what it made is worth knowing."""
        made = [out] if isinstance(out, torch.Tensor) else list(out) if isinstance(out, (tuple, list)) else []
        if not made or not all(isinstance(each, FakeTensor) and _worth_knowing(each) for each in made):
            return False
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        leaves, spec = tree_flatten((args, kwargs))
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                leaves[place] = self.value(leaf)
                if leaves[place] is None or leaf.numel() > LARGEST:
                    return False
        real_args, real_kwargs = tree_unflatten(leaves, spec)
        with no_dispatch():
            computed = func(*real_args, **real_kwargs)
        self._known.update(zip(made, tensors_in(computed), strict=True))
        return True

    def _forget(self, tensors: Any) -> None:
        """These are unknown now, and so is whatever shares their storage."""
        for tensor in tensors_in(tensors):
            known = self._known.get(tensor)
            if known is not None:
                storage = known.untyped_storage()._cdata
                for fake, other in list(self._known.items()):
                    if other.untyped_storage()._cdata == storage:
                        del self._known[fake]


def _worth_knowing(tensor: torch.Tensor) -> bool:
    return not tensor.dtype.is_floating_point and tensor.numel() <= LARGEST


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """What `func` writes to, by its schema."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[place] if place < len(args) else kwargs.get(argument.name)
