"""The memory of a model that was read: each tensor in a storage of its own, and what they come to."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.ledger.owners import beside, module_claims, packs
from harness.ledger.tensors import tensors_in

Owned = dict[int, tuple[Tensor, Tensor]]
"""By where it was, a tensor and the one that took its place: it is kept meanwhile, so that no other has that place."""


def nbytes(model: nn.Module) -> int:
    """Bytes of all that the model has, packed or not, each storage once."""
    parts = (part for _, _, held in module_claims(model) for part in tensors_in(held))
    return sum({part.untyped_storage()._cdata: part.nbytes for part in parts}.values())


def own(model: nn.Module) -> None:
    """Take what the model has out of mapped files, and out of storages larger than it is.

    Its buffers are its own already, unless weights are packed: what has two names in a layer stays one then.
    """
    quantized = getattr(model, "hf_quantizer", None) is not None
    known: set[int] = set()
    for module in model.modules():
        owned: Owned = {}
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in known:
                known.add(id(parameter))
                held = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
                if hasattr(held, "__tensor_flatten__"):
                    _own_parts(held, owned)
                else:
                    held.data = _owned(held.data, owned if quantized else {})
        for holder, key in _beside(module) if quantized else ():
            if type(holder[key]) is torch.Tensor:
                holder[key] = _owned(holder[key], owned)


def _own_parts(tensor: Any, owned: Owned) -> None:
    """The same for the tensors that `tensor` is made of."""
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if hasattr(part, "__tensor_flatten__"):
            _own_parts(part, owned)
        elif type(part) is torch.Tensor:
            setattr(tensor, name, _owned(part, owned))


def _beside(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a layer has what is no parameter of it, and packed: in which dict, under which key."""
    buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
    if packs(module) or any(not buffer.is_floating_point() for buffer in buffers):
        yield from ((module._buffers, key) for key in module._buffers)
    yield from ((holder, key) for _, holder, key in beside(module))


def _owned(tensor: Tensor, owned: Owned) -> Tensor:
    """`tensor` with a storage of its own, or with that of the same one before it."""
    if tensor.device.type != "cpu":
        return tensor
    was, own = owned.get(tensor.data_ptr(), (tensor, None))
    if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
        own = tensor.clone(memory_format=torch.contiguous_format)
        owned[tensor.data_ptr()] = was, own  # kept, so that no other takes its place
    return own
