"""Activation checkpointing: layers that keep little of their forward, and compute the rest again in backward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from harness.settings import Checkpointing, Refusal
from harness.stage import layers_of

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def kept() -> list[torch._ops.OpOverload]:
    """The operators whose results `selective` keeps: matrix products and attention, by far the most arithmetic."""
    found = (getattr(torch.ops.aten, name, None) for name in (*PRODUCTS, *ATTENTION))
    return [operator.default for operator in found if operator is not None]


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
        how["context_fn"] = partial(create_selective_checkpoint_contexts, kept())
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
    except LookupError as error:
        raise Refusal("checkpointing", asked.mode, f"{error}; use checkpointing=none") from error
    for number, layer in enumerate(layers, first):
        if number in asked.layers or (not asked.layers and number % asked.every == 0):
            yield layer
