"""Linear layers that multiply in 8 bits in training, by torchao: `precision=fp8`.

Weights, gradients and what is saved for backward stay in bf16. For each product torchao finds the largest value of each
factor and makes a copy of it in fp8 by that scale; none outlives the product. So fp8 is for speed: without a compiler,
which makes such a copy in one kernel, there are copies in fp32 on the way, and the peak may be higher than in bf16. Its
function also saves a view of the weight for backward, so that ZeRO-3 cannot free it after its layer's forward, unless
the layer is computed again.
Micikevicius et al. 2022, arXiv 2209.05433, with one scale for each tensor, found at each product.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.config.rules.fp8 import ROW, check_device
from harness.config.settings import Refusal, Settings
from harness.device.capability import capability
from harness.model import init_weights
from harness.model.plan import Plan
from harness.record import results
from harness.runtime.imports import import_torchao


def prove(plan: Plan, device: str) -> None:
    """Refuse `precision=fp8` on `device` ("cpu" or "cuda"), or for a model of which no layer is converted.

    It comes before any ledger: importing torchao makes tensors.
    """
    settings = plan.settings
    if settings.precision != "fp8":
        return
    known = settings.hardware.capability if torch.version.hip else capability(settings, device)
    check_device(device, known)
    import_torchao()
    if not converted(init_weights.outline(plan.config, torch.bfloat16, settings.model.attention)):
        remedy = (
            f"{plan.config.model_type} has no linear layer of {ROW}s of rows and columns; use precision=bf16"
        )
        raise Refusal("precision", "fp8", remedy)


def converted(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of `model` that multiply in 8 bits, by name: linear ones of such sizes, but for the head."""
    heads = [
        module.get_output_embeddings() for module in model.modules() if isinstance(module, PreTrainedModel)
    ]
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and not any(module is head for head in heads)
        and not (module.in_features % ROW or module.out_features % ROW)
    }


def apply(settings: Settings, model: nn.Module) -> None:
    """Let the linear layers of `model`, all or a stage of one, multiply in 8 bits. Its parameters stay the same."""
    if settings.precision == "fp8":
        layers = converted(model)
        import_torchao().convert_to_float8_training(model, module_filter_fn=lambda _, name: name in layers)


def sized(settings: Settings, record: results.Model, whole: nn.Module) -> results.Model:
    """The `record` of a model in training, with the layers that multiply in 8 bits; gradients do in `float8_e5m2`.

    Fused experts are matrices of no linear layer.
    """
    if settings.precision != "fp8":
        return record
    layers = converted(whole)
    linear = sum(isinstance(module, nn.Linear) for module in whole.modules())
    matrices = sum(each.numel() for each in whole.parameters() if each.dim() > 1) - (record.embeddings or 0)
    share = sum(layer.weight.numel() for layer in layers.values()) / matrices
    dtype = str(import_torchao().config.e4m3_dtype).removeprefix("torch.")
    return record.plus(products=results.Products(dtype=dtype, layers=len(layers), of=linear, share=share))
