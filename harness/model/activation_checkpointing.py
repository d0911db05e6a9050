"""Activation checkpointing: layers that keep little of their forward, and compute the rest again in backward."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from harness.config.load import Checkpointing, Refusal
from harness.ledger.tensors import tensors_in
from harness.model.stage import Uncuttable, layers_of

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
"""The operators whose results `selective` keeps: matrix products and attention, nearly all of the arithmetic."""


def apply(model: PreTrainedModel, asked: Checkpointing, first: int = 0) -> None:
    """Let the layers of `model` that are `asked` for be computed again in backward, while it is in training mode.

    Its first layer is number `first` of the whole model. Gradients are those without it, bit for bit: random numbers
    are drawn again from the state they were drawn from. Raises Refusal where the model's layers cannot.
    """
    chosen = list(_chosen(model, asked, first))
    if not chosen:
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if asked.mode == "selective":
        how["context_fn"] = selective
    # the older of its two names is deprecated, and before transformers 5.23 the only one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if model.supports_gradient_checkpointing:
        enable(how)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(module is layer for layer in chosen):
            module.gradient_checkpointing = False
    for layer in chosen:
        function: Any = getattr(layer, "_gradient_checkpointing_func", None)
        took = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
        if not took or getattr(function, "keywords", None) != how:
            remedy = f"the layers of {model.config.model_type} cannot be recomputed; use checkpointing=none"
            raise Refusal("checkpointing", asked.mode, remedy)


def _chosen(model: PreTrainedModel, asked: Checkpointing, first: int) -> Iterator[torch.nn.Module]:
    if asked.mode == "none":
        return
    try:
        _, layers = layers_of(model)
    except Uncuttable as error:
        raise Refusal("checkpointing", asked.mode, f"{error}; use checkpointing=none") from error
    for number, layer in enumerate(layers, first):
        if number in asked.layers or (not asked.layers and number % asked.every == 0):
            yield layer


def selective() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a layer's forward and of its recomputation: torch's own, each under an `Only`."""
    forward, again = create_selective_checkpoint_contexts(KEPT)
    changed: WeakSet[Any] = WeakSet()
    return _both(forward, Only(changed)), _both(again, Only(changed, again=True))


@contextmanager
def _both(below: Any, above: Any) -> Iterator[None]:
    with below, above:
        yield


class Only(TorchDispatchMode):
    """Shows the mode below it the operators that are `KEPT`, and no others.

    torch's own expects all others to be the same both times; those of ZeRO-3, which gathers within a layer, are not.
    And it keeps a tensor, not its value: a product that is changed in place, as ZeRO-3 adds a bias, is not changed a
    second time. `changed` are the storages of such, found in forward.
    """

    def __init__(self, changed: WeakSet[Any], again: bool = False) -> None:
        super().__init__()
        self.changed, self.again = changed, again
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
        elif self.again and func._schema.is_mutable and self.changed & _storages(args[:1]):
            return args[0]
        else:
            with _pop_mode_temporarily():
                out = func(*args, **kwargs)
        if not self.again:
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """What `func` read or changed of what is kept. Raises RuntimeError where it changed what was read before."""
        taken = {storage for storage in _storages((args, kwargs)) if storage in self._kept}
        if not taken:
            return
        changed = taken & _storages(args[:1]) if func._schema.is_mutable else set()
        if self._read & changed:
            raise RuntimeError(
                f"checkpointing=selective keeps a matrix product that {func} changes in place after it was used; "
                "use checkpointing=full"
            )
        self.changed.update(changed)
        self._read.update(taken - changed - _storages((out,)))


def _storages(tree: Any) -> set[Any]:
    return {tensor.untyped_storage() for tensor in tensors_in(tree)}
