"""Weights of linear layers in NF4 for training beside them: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

The layers, the packing and the product are those of bitsandbytes, which transformers and peft use too; torchao has no
NF4 since 0.18. A rehearsal runs the same layers on fake tensors: each operator of theirs gives the shape of its result,
and only their class of parameter cannot be fake (`rehearsal/tensor_shims.py`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from harness.quantization.packing import layers_to_pack
from harness.runtime.imports import import_bitsandbytes


def config_for(dtype: str) -> dict[str, Any]:
    """transformers' `BitsAndBytesConfig` of QLoRA, as a mapping, in a run that computes in `dtype`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def import_library() -> Any:
    """bitsandbytes, whose product counts as one of the unpacked weight.

    Before any ledger, a weight is packed: the library then makes tables that it keeps.
    """
    library = import_bitsandbytes()
    product = torch.ops.bitsandbytes.gemm_4bit
    if product not in flop_registry:
        register_flop_formula(product, get_raw=True)(_flops)
        library.functional.quantize_4bit(torch.zeros(64), compress_statistics=True, quant_type="nf4")
    return library


def _flops(taken: Tensor, packed: Tensor, shape: Any, *others: Any, **options: Any) -> int:
    return 2 * taken.numel() * int(shape[0])


class Packer:
    """Packs the linear layers of a model that transformers would pack, a part of the model at a time."""

    def __init__(self, model: PreTrainedModel, config: Mapping[str, Any]) -> None:
        self.names = {name for name, *_ in layers_to_pack(model, "bitsandbytes", config)}
        self.whole = model

    def __call__(self, name: str, module: nn.Module) -> None:
        """Pack what is in `module`, whose name in the model is `name`; each whole weight is freed before the next."""
        for inner, layer in [*module.named_modules()]:
            path = ".".join(filter(None, (name, inner)))
            if path in self.names:
                self.names.remove(path)
                self.whole.set_submodule(path, _packed(layer))

    def finish(self) -> None:
        """Pack the rest, and mark the model as transformers marks one that it has packed: peft looks for that."""
        self("", self.whole)
        self.whole.is_loaded_in_4bit = True
        keep_layout(self.whole)


@torch.no_grad()
def _packed(layer: Any) -> nn.Module:
    """The layer in NF4, with the bias of `layer`, whose weight is freed."""
    library = import_library()
    weight = layer.weight.data
    if isinstance(layer, Conv1D):
        weight = weight.t().contiguous()
    out, into = weight.shape
    data, state = library.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    layer.weight.data = layer.weight.data.new_empty(0)  # whoever initialises the model still refers to it
    linear = library.nn.Linear4bit(into, out, False, weight.dtype, quant_type="nf4", device="meta")
    linear.weight = library.nn.Params4bit(
        data, quant_state=state, quant_type="nf4", bnb_quantized=True, module=linear
    )
    linear.weight._is_hf_initialized = True
    linear.quant_state, linear.bias = state, layer.bias
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    return linear  # type: ignore[no-any-return]


def keep_layout(model: nn.Module) -> None:
    """Keep the weights of `model` in the layout that gradients pass through: in an evaluation on some CPUs the library
    would change it to another for good.
    """
    for layer in layers_of(model):
        layer.support_avx512bf16_for_cpu = False


def layers_of(model: nn.Module) -> Iterator[Any]:
    """The packed layers of `model`."""
    kind = import_library().nn.Linear4bit
    yield from (module for module in model.modules() if isinstance(module, kind))
