"""The memory of a loaded model: give each tensor a storage of its own, and measure the storages."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.ledger.owners import auxiliary_tensors, module_claims, packs
from harness.ledger.tensors import tensors_in

Owned = dict[int, tuple[Tensor, Tensor]]
"""From a tensor's old address to that tensor and its copy. The old tensor is kept alive, so that no other gets its
address.
"""


def nbytes(model: nn.Module) -> int:
    """Bytes of all tensors of the model, packed or not; each storage counts once."""
    parts = (part for _, _, tensors in module_claims(model) for part in tensors_in(tensors))
    return sum({part.untyped_storage()._cdata: part.nbytes for part in parts}.values())


def give_own_storage(model: nn.Module) -> None:
    """Copy tensors out of memory-mapped files and out of storages that are larger than the tensor.

    Buffers already have storages of their own unless weights are packed. With packed weights, two names of one tensor
    in a layer stay one tensor.
    """
    quantized = getattr(model, "hf_quantizer", None) is not None
    visited: set[int] = set()
    for module in model.modules():
        owned: Owned = {}
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in visited:
                visited.add(id(parameter))
                tensor = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
                if hasattr(tensor, "__tensor_flatten__"):
                    _own_parts(tensor, owned)
                else:
                    tensor.data = _owned(tensor.data, owned if quantized else {})
        for holder, key in _other_tensors(module) if quantized else ():
            if type(holder[key]) is torch.Tensor:
                holder[key] = _owned(holder[key], owned)


def _own_parts(tensor: Any, owned: Owned) -> None:
    """Do the same for the inner tensors of `tensor`."""
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if hasattr(part, "__tensor_flatten__"):
            _own_parts(part, owned)
        elif type(part) is torch.Tensor:
            setattr(tensor, name, _owned(part, owned))


def _other_tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """The dict and the key of each tensor of a packed layer that is not a parameter."""
    buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
    if packs(module) or any(not buffer.is_floating_point() for buffer in buffers):
        yield from ((module._buffers, key) for key in module._buffers)
    yield from ((holder, key) for _, holder, key in auxiliary_tensors(module))


def _owned(tensor: Tensor, owned: Owned) -> Tensor:
    """A copy of `tensor` in a storage of its own; the earlier copy where the same tensor was copied before."""
    if tensor.device.type != "cpu":
        return tensor
    original, copy = owned.get(tensor.data_ptr(), (tensor, None))
    if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
        copy = tensor.clone(memory_format=torch.contiguous_format)
        owned[tensor.data_ptr()] = original, copy  # kept alive, so that no other tensor gets its address
    return copy
