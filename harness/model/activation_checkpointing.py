"""Activation checkpointing: layers save few activations in forward and recompute the rest in backward."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from harness.config.load import Checkpointing, Refusal
from harness.ledger.tensors import tensors_in
from harness.model.stage import layers_for

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
KEPT = [
    getattr(torch.ops.aten, name).default for name in (*PRODUCTS, *ATTENTION) if hasattr(torch.ops.aten, name)
]
"""The operators whose results `selective` saves: matrix products and attention, nearly all of the arithmetic."""


def apply(
    model: PreTrainedModel,
    checkpointing: Checkpointing,
    first: int = 0,
    offload: saved_tensors_hooks | None = None,
) -> None:
    """Let the layers that `checkpointing` selects recompute their activations in backward, while `model` is in training
    mode.

    The model's first layer has number `first` in the whole model. What `selective` saves is packed by the hooks of
    `offload`, if there are any: torch keeps it itself, and asks no hook for it. Gradients are bit for bit those without
    checkpointing: the random state is restored before the recomputation. Raises Refusal where the model's layers do not
    support this.
    """
    layers = list(_selected_layers(model, checkpointing, first))
    if not layers:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing.mode == "selective":
        options["context_fn"] = partial(selective, offload)
    # transformers 5.23 deprecates gradient_checkpointing_enable; before it, that is the only name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if model.supports_gradient_checkpointing:
        enable(options)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(module is layer for layer in layers):
            module.gradient_checkpointing = False
    for layer in layers:
        function: Any = getattr(layer, "_gradient_checkpointing_func", None)
        enabled = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
        if not enabled or getattr(function, "keywords", None) != options:
            remedy = f"the layers of {model.config.model_type} cannot be recomputed; use checkpointing=none"
            raise Refusal("checkpointing", checkpointing.mode, remedy)


def _selected_layers(
    model: PreTrainedModel, checkpointing: Checkpointing, first: int
) -> Iterator[torch.nn.Module]:
    if checkpointing.mode == "none":
        return
    _, layers = layers_for(model, "checkpointing", checkpointing.mode, "use checkpointing=none")
    for number, layer in enumerate(layers, first):
        if number in checkpointing.layers or (not checkpointing.layers and number % checkpointing.every == 0):
            yield layer


def selective(
    offload: saved_tensors_hooks | None = None,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a layer's forward and of its recomputation: torch's own, each under a `KeptOperatorsOnly`.

    With `offload` what torch saves is packed by its hooks when the forward ends: until then it may be changed in place.
    """
    forward, recompute = create_selective_checkpoint_contexts(KEPT)
    changed: WeakSet[Any] = WeakSet()
    pack = (lambda: None) if offload is None else partial(_pack, forward.storage, offload, changed)
    return _nested(forward, KeptOperatorsOnly(changed), pack), _nested(
        recompute, KeptOperatorsOnly(changed, recomputing=True)
    )


@contextmanager
def _nested(below: Any, above: Any, after: Callable[[], None] = lambda: None) -> Iterator[None]:
    with below, above:
        yield
    after()


@torch.no_grad()
def _pack(storage: Any, offload: saved_tensors_hooks, changed: WeakSet[Any]) -> None:
    """Put what hooks pack in the place of the tensors that torch saved in `storage`: by operator and call.

    The calls of an operator are a list up to torch 2.12, and a dict by number since.
    """
    for results in storage.values():
        for number, saved in [*(results.items() if isinstance(results, dict) else enumerate(results))]:
            results[number] = tree_map_only(
                checkpoint._VersionWrapper, lambda each: _packed(each, offload, changed), saved
            )


def _packed(saved: Any, offload: saved_tensors_hooks, changed: WeakSet[Any]) -> Any:
    value = saved.get_val(False)
    return Packed(value, offload, changed) if isinstance(value, torch.Tensor) else saved


class Packed:
    """A tensor that `offload` has packed, as torch's selective checkpointing asks for it: by `get_val`, once."""

    def __init__(self, tensor: torch.Tensor, offload: saved_tensors_hooks, changed: WeakSet[Any]) -> None:
        self._offload, self._changed = offload, changed
        self._was_changed = tensor.untyped_storage() in changed
        self._packed = offload.pack_hook(tensor)

    def get_val(self, allow_cache_entry_mutation: bool) -> torch.Tensor:
        """The tensor, on its device again. If it was changed in place before it was packed, it is not to be again."""
        back: torch.Tensor = self._offload.unpack_hook(self._packed)
        if self._was_changed:
            self._changed.add(back.untyped_storage())
        return back


class KeptOperatorsOnly(TorchDispatchMode):
    """Pass only the operators in `KEPT` to the mode below it.

    torch's selective checkpointing expects the same operators in both forwards. The operators of ZeRO-3 differ, as it
    gathers parameters within a layer. torch also saves a tensor, not its value: a product that is changed in place
    (ZeRO-3 adds a bias so) must not be changed again in the recomputation. `changed` has the storages of such products,
    collected in the first forward.
    """

    def __init__(self, changed: WeakSet[Any], recomputing: bool = False) -> None:
        super().__init__()
        self.changed, self.recomputing = changed, recomputing
        self._kept: WeakSet[Any] = WeakSet()
        self._read: WeakSet[Any] = WeakSet()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KEPT:
            out = func(*args, **kwargs)
            self._kept.update(_storages(out))
        elif self.recomputing and func._schema.is_mutable and self.changed & _storages(args[:1]):
            return args[0]
        else:
            with _pop_mode_temporarily():
                out = func(*args, **kwargs)
        if not self.recomputing:
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record which saved products `func` reads and which it changes. Raises RuntimeError where it changes one that
        was read before.
        """
        used = {storage for storage in _storages((args, kwargs)) if storage in self._kept}
        if not used:
            return
        changed = used & _storages(args[:1]) if func._schema.is_mutable else set()
        if self._read & changed:
            raise RuntimeError(
                f"checkpointing=selective keeps a matrix product that {func} changes in place after it was used; "
                "use checkpointing=full"
            )
        self.changed.update(changed)
        self._read.update(used - changed - _storages((out,)))


def _storages(tree: Any) -> set[Any]:
    return {tensor.untyped_storage() for tensor in tensors_in(tree)}
