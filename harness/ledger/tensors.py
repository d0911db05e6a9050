"""Questions about tensors: nested, wrapped, distributed, fake, or without memory."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, wraps
from math import prod
from typing import Any, ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}
"""Layouts without a storage of their own, and the dense tensors that such a tensor consists of."""

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""Classes whose attributes can be read without calling code of the program."""

P = ParamSpec("P")
R = TypeVar("R")


def without_torch_function(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, called so that no TorchFunctionMode of the program sees its questions about tensors."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts. For a tensor that consists of others, those."""
    if type(tree) in PLAIN_TYPES:
        yield tree
        return
    if isinstance(tree, torch.Tensor):
        if hasattr(tree, "__tensor_flatten__"):
            for name in tree.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(tree, name))
        elif _has_own_dispatch(type(tree)) and not has_memory(tree):
            yield from tensors_in([part for part in vars(tree).values() if isinstance(part, torch.Tensor)])
        else:
            yield tree
        return
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ():
        if type(item) in PLAIN_TYPES:
            yield item
        elif isinstance(item, (torch.Tensor, tuple, list, dict)):
            yield from tensors_in(item)


@cache
def _has_own_dispatch(tensor_type: type[torch.Tensor]) -> bool:
    """Whether tensors of this class may consist of others without naming them."""
    return tensor_type.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not issubclass(
        tensor_type, FakeTensor
    )


def sizes_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in which a nested tensor with a storage keeps the layout of its rows."""
    return [
        tensor._nested_tensor_size(),
        tensor._nested_tensor_strides(),
        tensor._nested_tensor_storage_offsets(),
    ]


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with the memory of a tensor without a storage: a sparse one, or one that torch.func wraps."""
    functorch: Any = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(tensor):
        return [functorch.get_unwrapped(tensor)]
    return [getattr(tensor, name)() for name in _PARTS.get(tensor.layout, ())]


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The storage of `tensor`. None if it has none."""
    try:
        return tensor.untyped_storage()
    except (RuntimeError, ValueError):  # another layout, or an uninitialised parameter of a lazy module
        return None


def shared(types: Iterable[type]) -> bool:
    """Whether one of these tensor types is DTensor, which combines this rank's part with the sharding over ranks.

    A mode that does not handle an operator on DTensors then sees the operators on their parts.
    """
    return any(issubclass(kind, DTensor) for kind in types)


def is_wrapper(tensor_type: type, arguments: Iterable[Any]) -> bool:
    """Whether tensors of this type, of which `arguments` contains one, have no data but refer to other tensors."""
    if issubclass(tensor_type, FakeTensor):
        return False
    if issubclass(tensor_type, DTensor) or hasattr(tensor_type, "__tensor_flatten__"):
        return True
    example = next((tensor for tensor in tensors_in(list(arguments)) if type(tensor) is tensor_type), None)
    return example is not None and not has_memory(example)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has a storage with an address."""
    storage = storage_of(tensor)
    try:
        return storage is not None and storage.data_ptr() >= 0
    except RuntimeError:
        return False


def device_of(tensor: torch.Tensor) -> str:
    """The device type of `tensor`. For a fake tensor the full device name, read without an operator."""
    fake_device = getattr(tensor, "fake_device", None)
    return tensor.device.type if fake_device is None else str(fake_device)


def places(device: str, fakes: bool) -> Callable[[torch.Tensor], bool]:
    """A fast test whether a tensor is on `device`. Without `fakes`, fake tensors fail it: they have no memory."""
    if not fakes:
        if device == "cpu":
            return lambda tensor: tensor.is_cpu and type(tensor) is not FakeTensor
        return lambda tensor: tensor.device.type == device and type(tensor) is not FakeTensor
    wanted = torch.device(device)

    def is_on_device(tensor: torch.Tensor) -> bool:
        fake_device = getattr(tensor, "fake_device", None)
        return tensor.device.type == device if fake_device is None else bool(fake_device == wanted)

    return is_on_device


def sizes(device: str, fakes: bool) -> Callable[[torch.Tensor], int]:
    """A function from a tensor to its bytes in memory, without repetitions. 0 where `places` says it is not there."""
    on_device = places(device, fakes)

    def size(tensor: torch.Tensor) -> int:
        if not on_device(tensor):
            return 0
        try:
            stride = tensor.stride()
        except RuntimeError:  # a layout without strides
            storage = storage_of(tensor)
            return storage.nbytes() if storage is not None else sum(map(size, parts_of(tensor)))
        if 0 in stride and tensor.numel():
            if tensor.layout in _PARTS:  # in coordinates: all its strides are 0
                return sum(map(size, parts_of(tensor)))
            return tensor.itemsize * prod(
                length for length, step in zip(tensor.shape, stride, strict=True) if step
            )
        return tensor.nbytes

    def size_on_cpu(tensor: torch.Tensor) -> int:
        """`size` with a shorter way for most tensors: it is called for each of each operator."""
        try:
            if type(tensor) in PLAIN_TYPES and tensor.is_cpu and tensor.is_contiguous():
                return tensor.nbytes
        except RuntimeError:  # a layout without strides
            pass
        return size(tensor)

    return size if fakes or device != "cpu" else size_on_cpu
