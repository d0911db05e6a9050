"""What a test does to the models of its process so that a number in them is not finite."""

import gc
from collections.abc import Iterator

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from torch import nn
from transformers import PreTrainedModel

from harness.training.checkpoint import FLAT_MASTERS

PLACE = "model.layers.1.mlp.down_proj"
"""The module that is poisoned."""


def modules(place: str = PLACE) -> Iterator[nn.Linear]:
    """The module `place` of each model of this process that has values."""
    for each in gc.get_objects():
        if isinstance(each, PreTrainedModel):
            module = dict(each.named_modules()).get(place)
            if isinstance(module, nn.Linear) and module.weight.device.type != "meta":
                yield module


def weight(value: float = torch.nan) -> None:
    """Set the weight to `value`; under ZeRO-3, this rank's part of it."""
    for module in modules():
        getattr(module.weight, "ds_tensor", module.weight).data.fill_(value)


def masters(value: float = torch.inf) -> None:
    """Set the weight, and this rank's fp32 master weights where it has them."""
    weight(value)
    for wrapper in [each for each in gc.get_objects() if isinstance(each, DeepSpeedOptimizer)]:
        for flat in (each for name in FLAT_MASTERS for each in getattr(wrapper, name, ())):
            flat.data.fill_(value)


def gradient() -> None:
    """Make the gradient of the module's next output NaN: the loss stays finite."""
    for module in modules():
        _spoil_once(module)


def _spoil_once(module: nn.Module) -> None:
    def spoil(_: nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.nan)
        handle.remove()

    handle = module.register_forward_hook(spoil)
