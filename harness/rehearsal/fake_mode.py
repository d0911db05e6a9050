"""Fake tensors, faster: a rehearsal dispatches a hundred thousand operators, most of them like ones before."""

import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from harness.ledger.tensors import shared, tensors_in

_aten = torch.ops.aten

logging.getLogger("torch._subclasses.fake_tensor").setLevel(
    logging.CRITICAL
)  # what fails says so by its exception

_KERNELS = frozenset(
    getattr(_aten, name).default
    for name in (
        *("alias", "detach", "expand", "permute", "t", "unsqueeze", "view", "_unsafe_view"),
        *("_to_copy", "copy_", "empty_strided"),
    )
) | {
    *(_aten.empty.memory_format, _aten.fill_.Scalar, _aten.select.int, _aten.slice.Tensor),
    *(_aten.transpose.int, _aten.view.dtype),
}
"""Operators whose kernel for `meta` is in C++ and says all there is to know: views, copies and empty tensors."""

_WAIT = torch.ops._c10d_functional.wait_tensor.default

_REMEMBERED = frozenset(
    getattr(_aten, name).default
    for name in ("linalg_vector_norm", "mm", "neg", "rsqrt", "silu", "silu_backward", "slice_backward")
) | {
    *(_aten.add.Tensor, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Scalar),
    *(_aten.pow.Tensor_Scalar, _aten.mean.dim, _aten.sum.dim_IntList),
}
"""Operators that make one new tensor, whose layout follows from those of what they take. Theirs are in Python."""

_WAIT = torch.ops._c10d_functional.wait_tensor.default
"""It returns what it was given, and its kernel for `meta` another."""


class Fakes(FakeTensorMode):
    """A FakeTensorMode that is asked only what is new: most operators take a fraction of its time."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._layouts: dict[
            Any, tuple[Any, Any, torch.dtype]
        ] = {}  # what operators made: size, stride, dtype

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types and shared(types):
            return NotImplemented
        if func is _WAIT:
            return args[0]
        if func.namespace == "c10d":  # what it returns are its arguments
            with in_kernel_invocation_manager(self):
                return func(*args, **kwargs)
        if func is _WAIT:  # what it waits for, as in a run; torch would make another of it
            return args[0]
        device = None
        made_of_others = any(hasattr(each, "__tensor_flatten__") for each in types)
        if not made_of_others and (func in _KERNELS or func in _REMEMBERED):
            device = self._device(args, kwargs)
        if device is None:
            made = self.dispatch(func, types, args, kwargs)
            if type(made) is FakeTensor:
                made.constant = None  # Values knows it, and on which device it is
            return made
        if func in _REMEMBERED:
            return self._remembered(func, types, args, kwargs, device)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta", "pin_memory": False}
        with in_kernel_invocation_manager(self):
            made = func(*args, **kwargs)
        return made if type(made) is FakeTensor else FakeTensor(self, made, device)

    def _remembered(self, func: Any, types: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """As empty as what `func` made of the like before."""
        key = func, *map(_layout, args), *((name, _layout(value)) for name, value in kwargs.items())
        known = self._layouts.get(key)
        if known is None:
            made: Any = self.dispatch(func, types, args, kwargs)
            self._layouts[key] = made.size(), made.stride(), made.dtype
            return made
        size, stride, dtype = known
        with in_kernel_invocation_manager(self):
            made = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        return FakeTensor(self, made, device)

    def _device(self, args: Any, kwargs: Any) -> torch.device | None:
        """Where what is made of these will be; None where FakeTensorMode must say."""
        devices = set()
        for tensor in tensors_in(args):
            if type(tensor) is not FakeTensor or tensor.fake_mode is not self:
                return None
            devices.add(tensor.fake_device)
        asked = kwargs.get("device")
        if asked is not None:
            return torch.device(asked)
        return devices.pop() if len(devices) == 1 else None


def _layout(argument: Any) -> Any:
    """All of `argument` that an operator can see."""
    if isinstance(argument, torch.Tensor):
        return argument.size(), argument.stride(), argument.dtype
    return tuple(argument) if isinstance(argument, list) else (type(argument), argument)
