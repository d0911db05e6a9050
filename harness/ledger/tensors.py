"""Tensors as the ledger takes them: nested in anything, made of others, shared among ranks, fake, or without memory."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}
"""Layouts without a storage of their own, and the dense tensors that such a tensor is made of."""


P = ParamSpec("P")
R = TypeVar("R")


def unnoticed(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which asks tensors what they are, without a word to a TorchFunctionMode of the program's."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts; of one that is made of others, those."""
    if isinstance(tree, torch.Tensor):
        if hasattr(tree, "__tensor_flatten__"):
            for name in tree.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(tree, name))
        elif _dispatches(type(tree)) and not has_memory(tree):
            yield from tensors_in([part for part in vars(tree).values() if isinstance(part, torch.Tensor)])
        else:
            yield tree
        return
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ():
        if isinstance(item, (torch.Tensor, tuple, list, dict)):
            yield from tensors_in(item)


@cache
def _dispatches(kind: type[torch.Tensor]) -> bool:
    """Whether tensors of this class may be made of others, and not say of which."""
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not issubclass(kind, FakeTensor)


def sizes_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in which a nested one that has a storage keeps how its rows lie there."""
    return [
        tensor._nested_tensor_size(),
        tensor._nested_tensor_strides(),
        tensor._nested_tensor_storage_offsets(),
    ]


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the memory of one that has no storage: a sparse one's, or what torch.func has wrapped."""
    wrapped: Any = torch._C._functorch
    if wrapped.is_functorch_wrapped_tensor(tensor):
        return [wrapped.get_unwrapped(tensor)]
    return [getattr(tensor, name)() for name in _PARTS.get(tensor.layout, ())]


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The storage of `tensor`; None where it has none."""
    try:
        return tensor.untyped_storage()
    except (RuntimeError, ValueError):  # of another layout, or a lazy module's that is yet to be made
        return None


def shared(types: Iterable[type]) -> bool:
    """Whether among these kinds of tensors is DTensor, which is this rank's part and the word of how ranks share it.

    A mode that leaves an operator on such to them is shown what they do with the parts.
    """
    return any(issubclass(kind, DTensor) for kind in types)


def stands_for_others(kind: type, arguments: Iterable[Any]) -> bool:
    """Whether tensors of this kind, of which there is one among `arguments`, are only words about others."""
    if issubclass(kind, FakeTensor):
        return False
    if issubclass(kind, DTensor) or hasattr(kind, "__tensor_flatten__"):
        return True
    one = next((each for each in tensors_in(list(arguments)) if type(each) is kind), None)
    return one is not None and not has_memory(one)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has a storage with an address."""
    storage = storage_of(tensor)
    try:
        return storage is not None and storage.data_ptr() >= 0
    except RuntimeError:
        return False


def device_of(tensor: torch.Tensor) -> str:
    """Where `tensor` is: the kind of device; of a fake one its whole name, asked for without an operator."""
    fake = getattr(tensor, "fake_device", None)
    return tensor.device.type if fake is None else str(fake)


def places(device: str, fakes: bool) -> Callable[[torch.Tensor], bool]:
    """Whether a tensor is on `device`, the quickest way. Without `fakes` a fake one is nowhere: it holds nothing."""
    if not fakes:
        if device == "cpu":
            return lambda tensor: tensor.is_cpu and type(tensor) is not FakeTensor
        return lambda tensor: tensor.device.type == device and type(tensor) is not FakeTensor
    place = torch.device(device)

    def there(tensor: torch.Tensor) -> bool:
        fake = getattr(tensor, "fake_device", None)
        return tensor.device.type == device if fake is None else bool(fake == place)

    return there
