"""A faster FakeTensorMode that knows small values: a rehearsal dispatches a hundred thousand operators.

Most are views, or equal to earlier ones: `shortcut` returns their results without torch's own dispatch, and the log
calls it without a dispatch of its own.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._ops import HigherOrderOperator
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from harness.device.call import Card
from harness.device.kernels import KERNELS
from harness.ledger.lines import calling_line
from harness.ledger.op_cost import COLLECTIVES
from harness.ledger.tensors import shared
from harness.rehearsal.card import CARD, in_cpp, in_python
from harness.rehearsal.card_backward import WRITES, in_place
from harness.rehearsal.known_values import REMEDY, KnownValues, NeedsValue

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
    for name in (
        *(
            "clone",
            "empty_like",
            "linalg_vector_norm",
            "mm",
            "neg",
            "normal_",
            "rsqrt",
            "silu",
            "silu_backward",
        ),
        *("slice_backward", "uniform_"),
    )
) | {
    *(_aten.add.Tensor, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Scalar, _aten.div.Tensor),
    *(_aten.add_.Tensor, _aten.div_.Tensor, _aten.mul_.Tensor),
    *(_aten.pow.Tensor_Scalar, _aten.mean.dim, _aten.sum.dim_IntList),
}
"""Operators that return one new tensor or their first argument, as follows from the layouts of the arguments.

Their `meta` kernels are slow Python code, so the resulting layouts are cached.
"""

_DEVICE = torch.ops.prim.device.default

_PIN = torch.ops.aten._pin_memory.default

_ITEM = torch.ops.aten._local_scalar_dense.default

_WHOLE = frozenset({_aten.item.default, _aten.is_nonzero.default})
"""Operators that read values. Under torch.inference_mode they arrive whole, and not as what they consist of."""

_EQUAL = torch.ops.aten.equal.default

_WAIT = torch.ops._c10d_functional.wait_tensor.default
"""The real operator returns its argument; its `meta` kernel returns another tensor."""

_WITH_RANDOM_STATE = frozenset({run_and_save_rng_state, run_with_rng_state})
"""With these a compiled layer computes an operator again in backward."""

_BACKEND = torch._C.DispatchKey.BackendSelect


class _Rule(NamedTuple):
    """What `Fakes` does with an operator."""

    func: Any
    """The operator, so that no other gets its id."""
    quick: bool
    """Whether `shortcut` may know its result."""
    remembered: bool
    writes: bool
    """Whether it writes to an argument, by its schema."""
    accumulates: bool
    """Whether autograd may call its in-place form on a GPU."""
    among_ranks: bool
    """Whether it is a collective that returns its arguments."""


class Fakes(FakeTensorMode):
    """A FakeTensorMode with shortcuts, for which small integers and booleans have values (`known_values.py`).

    With `card` its CUDA device is that one, and autograd writes in place where it does on a GPU. A value that is not
    known is `assumed`; without that it is 0 or 1, or with `strict` refused by NeedsValue.
    """

    supports_higher_order_operators = True

    def __init__(self, card: Card | None = None, assumed: float | None = None, strict: bool = False) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.values = KnownValues(assumed, strict)
        self._card = card
        self._inside = False  # whether an operator of the program is being carried out, by others
        self._rules: dict[int, _Rule] = {}  # by the id of an operator, as hashing one calls Python
        self._attributes: dict[torch.device, dict[str, Any]] = {}  # of a new fake tensor, by its device
        # from an operator and its arguments' layouts to its output's size, stride and dtype; None: the first argument
        self._layouts: dict[Any, tuple[Any, Any, torch.dtype] | None] = {}

    @property
    def avoid_device_init(self) -> bool:
        """Make torch create a tensor from data on the host first: there is no device that it could be created on."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.shortcut(func, types, args, kwargs)
        if out is not NotImplemented:
            return out
        if types and shared(types):
            return NotImplemented
        if self._inside:
            return self._result(func, types, args, kwargs)
        if func in _WITH_RANDOM_STATE:
            with self:
                return func.py_kernels[_BACKEND](*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            raise RuntimeError(
                f"{calling_line()}: {func} is an operator on functions, and these are not rehearsed"
            )
        if func in _WHOLE:
            with self:  # what it consists of arrives here
                return func.decompose(*args, **kwargs)
        if func is _ITEM:
            return self.values.item(args[0])
        if func is _EQUAL:
            return self.values.equal(*args)
        if self._accumulates(func, args, kwargs):
            return args[0]
        self._inside = True
        try:
            out = self._result(func, types, args, kwargs)
        except DataDependentOutputException:
            raise NeedsValue(f"{calling_line()}: {func} reads values, {REMEDY}") from None
        except DynamicOutputShapeException:
            with self:
                return self.values.with_known_shape(func, args, kwargs)
        finally:
            self._inside = False
        if func.namespace in COLLECTIVES:
            self.values.forget(args)
        else:
            self.values.learn(func, args, kwargs, out)
        return out

    def shortcut(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of `func` where it follows from layouts. NotImplemented where torch must dispatch it."""
        if func is _DEVICE:
            return in_cpp(args[0].fake_device)
        rule = self._rules.get(id(func)) or self._rule(func)
        if not rule.quick or (types and types != _ONLY_FAKES):
            return NotImplemented
        if rule.among_ranks:
            self.values.forget(args)  # the other ranks' values are unknown
            return self._in_kernel(func._op, args, kwargs)
        device = self._device(args, kwargs)
        if device is None:
            return NotImplemented
        if rule.accumulates and not self._inside and self._accumulates(func, args, kwargs):
            return args[0]
        out = (
            self._remembered(func, args, kwargs, device)
            if rule.remembered
            else self._on_meta(func, args, kwargs, device)
        )
        if (
            out is not NotImplemented
            and not self._inside
            and (rule.writes or not out.dtype.is_floating_point)
        ):
            self.values.learn(func, args, kwargs, out)
        return out

    def _rule(self, func: Any) -> _Rule:
        writes = not isinstance(func, HigherOrderOperator) and func._schema.is_mutable
        among_ranks, remembered = func.namespace == "c10d", func in _REMEMBERED
        quick = among_ranks or remembered or func in _KERNELS
        rule = self._rules[id(func)] = _Rule(func, quick, remembered, writes, func in WRITES, among_ranks)
        return rule

    def _accumulates(self, func: Any, args: Any, kwargs: Any) -> bool:
        return self._card is not None and in_place(func, args, kwargs)

    def _result(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What torch's own dispatch returns, or what a rehearsal returns in its place."""
        if func is _PIN:
            return args[0].clone()
        if func is _ITEM:  # inside of an operator
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func in KERNELS and self._card is not None and self._device(args, {}) == CARD:
            with self:  # under torch.inference_mode an operator arrives here before it is decomposed
                return KERNELS[func](*args, **kwargs, card=self._card)
        if func.namespace == "c10d":  # these operators return their arguments
            return self._in_kernel(func, args, kwargs)
        if func is _WAIT:  # return the argument, as in a run; torch's kernel would create a second tensor
            return args[0]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": in_python(kwargs["device"])}
        args = tuple(in_python(each) if isinstance(each, torch.device) else each for each in args)
        output = self.dispatch(func, types, args, kwargs)
        if type(output) is FakeTensor:
            output.constant = None  # `values` has the value instead, with its device
        return output

    def _remembered(self, func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
        """An empty tensor with the layout that `func` returned for equal arguments before, or the first argument.

        The first time it is torch's own result.
        """
        key = id(func), *map(_layout, args), *((name, _layout(value)) for name, value in kwargs.items())
        if key not in self._layouts:
            if "device" in kwargs:
                kwargs = {**kwargs, "device": device}
            output: Any = self.dispatch(func, _ONLY_FAKES, args, kwargs)
            same = output is args[0]
            self._layouts[key] = None if same else (output.size(), output.stride(), output.dtype)
            return output
        layout = self._layouts[key]
        if layout is None:
            return args[0]
        size, stride, dtype = layout
        options = {"dtype": dtype, "device": "meta"}
        return self._fake(self._in_kernel(torch.empty_strided, (size, stride), options), device)

    def _on_meta(self, func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
        """The result of the kernel for the device `meta`."""
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta", "pin_memory": False}
        output = self._in_kernel(func, args, kwargs)
        return output if type(output) is FakeTensor else self._fake(output, device)

    def _in_kernel(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`func`, called as torch's `in_kernel_invocation_manager` has it, in less time."""
        with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
            torch._C._set_meta_in_tls_dispatch_include(True)
            self.in_kernel_invocation = True
            try:
                return func(*args, **kwargs)
            finally:
                self.in_kernel_invocation = False

    def _fake(self, meta: torch.Tensor, device: torch.device) -> FakeTensor:
        """The fake tensor on `device` with the storage of `meta`, as its constructor makes it, in less time."""
        attributes = self._attributes.get(device)
        if attributes is None:
            tensor = FakeTensor(self, meta, device)
            self._attributes[device] = dict(vars(tensor))
            return tensor
        fake: FakeTensor = torch.Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)
        vars(fake).update(attributes)
        return fake

    def _device(self, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        """The device of the output; None where FakeTensorMode must decide."""
        device: torch.device | None = None
        for argument in args:
            if isinstance(argument, torch.Tensor):
                if type(argument) is not FakeTensor or argument.fake_mode is not self:
                    return None
                if argument.layout is not _STRIDED:  # a sparse one
                    return None
                if device is None:
                    device = argument.fake_device
                elif argument.fake_device != device:
                    device = None
                    break
        wanted = kwargs.get("device")
        return device if wanted is None else torch.device(in_python(wanted))


_ONLY_FAKES = (FakeTensor,)

_STRIDED = torch.strided


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
