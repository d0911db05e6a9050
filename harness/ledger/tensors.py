"""Tensors as the ledger takes them: nested in anything, made of others, shared among ranks, or fake."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts; of one that is made of others, those."""
    if isinstance(tree, torch.Tensor):
        if hasattr(tree, "__tensor_flatten__"):
            for name in tree.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(tree, name))
        else:
            yield tree
        return
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ():
        if isinstance(item, (torch.Tensor, tuple, list, dict)):
            yield from tensors_in(item)


def shared(types: Iterable[type]) -> bool:
    """Whether among these kinds of tensors is DTensor, which is this rank's part and the word of how ranks share it.

    A mode that leaves an operator on such to them is shown what they do with the parts.
    """
    return any(issubclass(kind, DTensor) for kind in types)


def device_of(tensor: torch.Tensor) -> str:
    """Where `tensor` is: the kind of device; of a fake one its whole name, asked for without an operator."""
    fake = getattr(tensor, "fake_device", None)
    return tensor.device.type if fake is None else str(fake)
