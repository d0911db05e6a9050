"""Widths of experts that the grouped matrix product does not support: the config key, and values that work."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from harness.config.settings import Model, Refusal

ROW = 16
"""A row of a grouped product must be a multiple of so many bytes: `check_valid_strides` of torch's `_grouped_mm`."""


def check(settings: Model, model: PreTrainedModel) -> None:
    """Raise Refusal for experts with unsupported row widths, in `model` or in this rank's part of it."""
    for module in model.modules():
        config = getattr(module, "config", None)
        transposed = getattr(module, "is_transposed", None)
        if transposed is None or getattr(config, "_experts_implementation", None) != "grouped_mm":
            continue
        for weight in module.parameters(recurse=False):
            part: Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
            width = part.shape[-2 if transposed else -1]
            if part.dim() == 3 and width * part.itemsize % ROW:
                whole = weight.shape[-2 if transposed else -1]
                raise _refusal(settings, model.config.get_text_config(decoder=True), whole, width, part.dtype)


def _refusal(
    settings: Model, config: PretrainedConfig, whole: int, width: int, dtype: torch.dtype
) -> Refusal:
    """The Refusal for a row of `width` elements, a rank's part of `whole` elements."""
    names = [name for name, value in vars(config).items() if value == whole and not isinstance(value, bool)]
    name = next((name for name in names if "size" in name or "dim" in name), "hidden_size")
    step, ranks = ROW // dtype.itemsize, -(-whole // width)
    rank_note = f", of which each of {ranks} ranks has {width}" if ranks > 1 else ""
    options = [f"use {-(-whole // (step * ranks)) * step * ranks}"] if settings.path is None else []
    options += ["use precision=fp32"] if dtype == torch.bfloat16 and width * 4 % ROW == 0 else []
    remedy = f"experts are computed together in rows of a multiple of {ROW} bytes, {step} elements{rank_note}"
    key = f"model.config.{name}" if settings.path is None else f"{settings.path}/config.json: {name}"
    return Refusal(key, whole, f"{remedy}; {' or '.join(options) or 'no precision has such rows'}")
