"""Activation offload: what a forward saves for its backward waits in the host's memory.

torch's own `save_on_cpu` copies it, on the stream that computes: a tensor is free as soon as its copy is queued, so
bytes do not depend on time. DeepSpeed's and TRL's offload copy on a second stream, and end with their `with` block: a
pipeline, whose forward ends long before its backward, would lose what they keep.
"""

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from transformers import PreTrainedModel

from harness.config.load import Checkpointing
from harness.ledger import Ledger
from harness.model.stage import layers_for


def apply(
    model: PreTrainedModel, checkpointing: Checkpointing, device: torch.device, ledger: Ledger
) -> "ActivationOffload | None":
    """Let what the part of `model` around its layers saves for backward wait in the host's memory, if `checkpointing`
    says so. The head and the loss are left out: their backward comes at once.

    Returns the hooks that do it, for what autograd does not save itself. Raises Refusal where the model has no list of
    layers.
    """
    if checkpointing.offload == "none":
        return None
    key, value = "checkpointing.offload", checkpointing.offload
    path, _ = layers_for(model, key, value, f"use {key}=none")
    around, hooks = model.get_submodule(path.rpartition(".")[0]), ActivationOffload(device, ledger)
    around.register_forward_pre_hook(lambda *_: hooks.__enter__())
    around.register_forward_hook(lambda *_: hooks.__exit__(), always_call=True)
    return hooks


class _Saved(NamedTuple):
    """What autograd keeps of a tensor of `device`: its elements, and its layout. With `gaps` it fills no stretch of
    memory, as a part of a fused projection.
    """

    device: torch.device
    copy: torch.Tensor
    size: Sequence[int]
    stride: Sequence[int]
    gaps: bool


class ActivationOffload(saved_tensors_hooks):
    """Hooks that copy what is saved on `device` to pinned memory of the host, and back for backward.

    Parameters stay where they are, with what refers to their memory: under ZeRO-3 that comes and goes. Tensors that lie
    in the same memory have one copy. A CPU is its own host: there the copies are made too, in the same memory, and not
    copied back. `ledger` counts what is on the host, and knows what comes back.
    """

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        super().__init__(self._pack, self._unpack)
        self._device, self._ledger, self._pinned = device.type, ledger, device.type != "cpu"
        self._torch = save_on_cpu(pin_memory=self._pinned, device_type=device.type)
        self._of_storage: weakref.WeakKeyDictionary[
            torch.UntypedStorage, weakref.WeakValueDictionary[Any, torch.Tensor]
        ] = weakref.WeakKeyDictionary()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        owner = tensor if tensor._base is None else tensor._base
        elsewhere = tensor.device.type != self._device or tensor.layout is not torch.strided
        if elsewhere or isinstance(owner, nn.Parameter) or not tensor.numel():
            return tensor
        steps = [(length, step) for length, step in zip(tensor.size(), tensor.stride(), strict=True) if step]
        elements = prod(length for length, _ in steps)  # each once, however often it is repeated
        gaps = 1 + sum((length - 1) * step for length, step in steps) != elements
        layout = (tensor.size(), tensor.stride()) if gaps else elements
        key = tensor.dtype, tensor.storage_offset(), layout, tensor._version
        copies = self._of_storage.setdefault(tensor.untyped_storage(), weakref.WeakValueDictionary())
        copy = copies.get(key)
        if copy is None:
            flat = _once(tensor).contiguous() if gaps else tensor.as_strided((elements,), (1,))
            copy = copies[key] = self._copied(flat, made=gaps)
        return _Saved(tensor.device, copy, tensor.size(), tensor.stride(), gaps)

    def _copied(self, flat: torch.Tensor, made: bool) -> torch.Tensor:
        if self._device == "cpu" and not made:
            flat = flat.clone()  # torch copies nothing that is on the host
        _, copy = self._torch.pack_hook(flat)
        self._ledger.on_host.add(copy, self._pinned)
        return copy  # type: ignore[no-any-return]

    def _unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        back: torch.Tensor = self._torch.unpack_hook((saved.device, saved.copy))
        if saved.gaps:  # kernels may round otherwise in another layout
            size = [length if step else 1 for length, step in zip(saved.size, saved.stride, strict=True)]
            back = back.new_empty_strided(size, saved.stride).copy_(back)
        self._ledger.claim("activations", "back from the host", back)
        return back.as_strided(saved.size, saved.stride)


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without repetitions."""
    for dimension, step in enumerate(tensor.stride()):
        tensor = tensor if step else tensor.narrow(dimension, 0, 1)
    return tensor
