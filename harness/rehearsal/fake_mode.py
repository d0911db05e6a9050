"""A faster FakeTensorMode: a rehearsal dispatches a hundred thousand operators, most of them equal to earlier ones."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from harness.device.call import Card
from harness.device.kernels import KERNELS
from harness.ledger.tensors import shared, tensors_in
from harness.rehearsal.card import CARD, in_cpp, in_python

_aten = torch.ops.aten

# the logger's errors are redundant: each failure also raises an exception
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)

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
"""Operators with a complete `meta` kernel in C++: views, copies and empty tensors."""

_REMEMBERED = frozenset(
    getattr(_aten, name).default
    for name in ("linalg_vector_norm", "mm", "neg", "rsqrt", "silu", "silu_backward", "slice_backward")
) | {
    *(_aten.add.Tensor, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Scalar),
    *(_aten.pow.Tensor_Scalar, _aten.mean.dim, _aten.sum.dim_IntList),
}
"""Operators that return one new tensor, whose layout follows from the layouts of the arguments.

Their `meta` kernels are slow Python code, so the resulting layouts are cached.
"""

_DEVICE = torch.ops.prim.device.default

_PIN = torch.ops.aten._pin_memory.default

_ITEM = torch.ops.aten._local_scalar_dense.default

_WAIT = torch.ops._c10d_functional.wait_tensor.default
"""The real operator returns its argument; its `meta` kernel returns another tensor."""


class Fakes(FakeTensorMode):
    """A FakeTensorMode with shortcuts: most operators take a fraction of the time of torch's own dispatch.

    With `card` its CUDA device is that one.
    """

    def __init__(self, card: Card | None = None) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._card = card
        # from an operator and its arguments' layouts to its output's size, stride and dtype
        self._layouts: dict[Any, tuple[Any, Any, torch.dtype]] = {}

    @property
    def avoid_device_init(self) -> bool:
        """Make torch create a tensor from data on the host first: there is no device that it could be created on."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types and shared(types):
            return NotImplemented
        if func is _DEVICE:
            return in_cpp(args[0].fake_device)
        if func is _PIN:
            return args[0].clone()
        if func is _ITEM:  # inside of an operator: a program's own is answered by `Values`
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func in KERNELS and self._card is not None and self._device(args, {}) == CARD:
            with self:  # under torch.inference_mode an operator arrives here before it is decomposed
                return KERNELS[func](*args, **kwargs, card=self._card)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": in_python(kwargs["device"])}
        if func.namespace == "c10d":  # these operators return their arguments
            with in_kernel_invocation_manager(self):
                return func(*args, **kwargs)
        if func is _WAIT:  # return the argument, as in a run; torch's kernel would create a second tensor
            return args[0]
        device = None
        wraps_others = any(hasattr(each, "__tensor_flatten__") for each in types)
        if not wraps_others and (func in _KERNELS or func in _REMEMBERED):
            device = self._device(args, kwargs)
        if device is None:
            output = self.dispatch(func, types, args, kwargs)
            if type(output) is FakeTensor:
                output.constant = None  # `Values` keeps the value instead, with its device
            return output
        if func in _REMEMBERED:
            return self._remembered(func, types, args, kwargs, device)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta", "pin_memory": False}
        with in_kernel_invocation_manager(self):
            output = func(*args, **kwargs)
        return output if type(output) is FakeTensor else FakeTensor(self, output, device)

    def _remembered(self, func: Any, types: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """An empty tensor with the layout that `func` returned for equal arguments before."""
        key = func, *map(_layout, args), *((name, _layout(value)) for name, value in kwargs.items())
        layout = self._layouts.get(key)
        if layout is None:
            output: Any = self.dispatch(func, types, args, kwargs)
            self._layouts[key] = output.size(), output.stride(), output.dtype
            return output
        size, stride, dtype = layout
        with in_kernel_invocation_manager(self):
            output = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        return FakeTensor(self, output, device)

    def _device(self, args: Any, kwargs: Any) -> torch.device | None:
        """The device of the output; None where FakeTensorMode must decide."""
        devices = set()
        for tensor in tensors_in(args):
            if type(tensor) is not FakeTensor or tensor.fake_mode is not self:
                return None
            devices.add(tensor.fake_device)
        device = kwargs.get("device")
        if device is not None:
            return torch.device(device)
        return devices.pop() if len(devices) == 1 else None


def _layout(argument: Any) -> Any:
    """Everything in `argument` on which an output's layout can depend, as a dictionary key."""
    if isinstance(argument, torch.Tensor):
        return argument.size(), argument.stride(), argument.dtype
    return tuple(argument) if isinstance(argument, list) else (type(argument), argument)


@contextmanager
def existing_objects_frozen() -> Iterator[None]:
    """Exclude existing objects from garbage collection in this context: most objects are those of imported modules."""
    if gc.get_freeze_count():  # the program's own, which `unfreeze` would undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
