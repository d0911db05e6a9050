"""Stand-ins for layers with packed weights: they have the tensors of the layout, and a matrix product without a kernel.

They work only with fake tensors. A product is one operator, like a library's kernel: it allocates its result. The
temporary memory of a real kernel is not known to a rehearsal.
"""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from harness.ledger.patch import TRANSFORMERS, Patch, install, table

_EXPERTS = "transformers.integrations.finegrained_fp8.FP8Experts"

PATCHES = table(
    Patch(
        _EXPERTS,
        "forward",
        "its products need kernels for packed weights",
        TRANSFORMERS,
        stays="as long as the layer lives; only a rehearsal has such layers",
    )
)


@torch.library.custom_op("harness::packed_product", mutates_args=())
def product(taken: Tensor, packed: list[Tensor], shape: list[int], flops: int) -> Tensor:
    """The result of `taken` times the weight in `packed`: a tensor of `shape`, with so many FLOPs."""
    raise NotImplementedError("packed weights are computed with by their own library")


@product.register_fake
def _(taken: Tensor, packed: list[Tensor], shape: list[int], flops: int) -> Tensor:
    return taken.new_empty(shape)


@torch.library.custom_op("harness::unpacked", mutates_args=())
def unpacked(packed: list[Tensor], out: int, into: int, dtype: torch.dtype) -> Tensor:
    """The weight in `packed`, unpacked: [out, into]."""
    raise NotImplementedError("packed weights are unpacked by their own library")


@unpacked.register_fake
def _(packed: list[Tensor], out: int, into: int, dtype: torch.dtype) -> Tensor:
    return packed[0].new_empty(out, into, dtype=dtype)


@register_flop_formula(torch.ops.harness.packed_product, get_raw=True)
def _flops(taken: Tensor, packed: Any, shape: Any, flops: int, *args: Any, **kwargs: Any) -> int:
    return flops


class PackedLinear(nn.Module):
    """A linear layer from `into` to `out` features, with the `tensors` of its layout and its bias as buffers.

    With `copies` the library unpacks the weight at each product, outside of any kernel.
    """

    bias: Tensor | None

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        out: int,
        into: int,
        bias: Tensor | None = None,
        copies: bool = False,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.copies, self.norm = out, into, copies, norm
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of its layout."""
        return [getattr(self, name) for name in self.names]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Its unpacked weight: [out, into]."""
        weight: Tensor = unpacked(self.tensors, self.out_features, self.in_features, dtype)
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """From [..., into] to [..., out]."""
        if self.norm is not None:
            inputs = self.norm(inputs)
        if self.copies:
            return nn.functional.linear(inputs, self.whole(inputs.dtype), self.bias)
        parts = self.tensors if self.bias is None else [*self.tensors, self.bias]
        flops = 2 * inputs.numel() * self.out_features
        output: Tensor = product(inputs, parts, [*inputs.shape[:-1], self.out_features], flops)
        return output


class FusedExperts(nn.Module):
    """Experts with one kernel for each of two products. The kernel selects the tokens of each expert and applies the
    gate.

    The layouts are `up`, from H to 2 I, and `down`, from I to H.
    """

    def __init__(self, up: Mapping[str, Tensor], down: Mapping[str, Tensor], inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.up, self.down = [f"gate_up_proj_{name}" for name in up], [f"down_proj_{name}" for name in down]
        for name, tensor in zip([*self.up, *self.down], [*up.values(), *down.values()], strict=True):
            self.register_buffer(name, tensor)

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """For T tokens [T, H], each with k `experts` [T, k] and their `weights`, to [T, H]."""
        rows, width = experts.numel(), hidden.shape[-1]
        up, down = ([getattr(self, name) for name in names] for names in (self.up, self.down))
        gated = product(hidden, up, [rows, self.inner], 4 * rows * width * self.inner)
        output: Tensor = product(gated, down, [*hidden.shape], 2 * rows * width * self.inner)
        return output


def group_products(experts: nn.Module) -> None:
    """Replace the products in transformers' `FP8Experts` by the stand-in; the rest is its grouped forward."""
    install(PATCHES[f"{_EXPERTS}.forward"].by(lambda _: MethodType(_grouped, experts), experts))


def _grouped(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """For T tokens [T, H], each with k experts, `top_k_index` [T, k], and their `top_k_weights`, to [T, H]; S = T k
    rows in between.
    """
    tokens, top_k = top_k_index.shape
    rows, width, inner = tokens * top_k, hidden_states.shape[-1], self.intermediate_dim
    order = torch.sort(top_k_index.reshape(-1))[1]
    selected = hidden_states[order // top_k]  # [S, H]
    name, columns = ("gate_up_proj", 2 * inner) if self.has_gate else ("up_proj", inner)
    output = product(selected, _weight_and_scale(self, name), [rows, columns], 2 * rows * width * columns)
    output = self._apply_gate(output) if self.has_gate else self.act_fn(output)  # [S, I]
    output = product(output, _weight_and_scale(self, "down_proj"), [rows, width], 2 * rows * width * inner)
    output = output * top_k_weights.reshape(-1)[order].to(output.dtype).unsqueeze(-1)
    output = output[torch.argsort(order)]
    summed: Tensor = output.view(tokens, top_k, width).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _weight_and_scale(experts: nn.Module, name: str) -> list[Tensor]:
    return [getattr(experts, name), getattr(experts, f"{name}_scale_inv")]


def make_whole_at_first(model: nn.Module) -> None:
    """Add a hook to `model` that unpacks each packed layer before its first forward, for good."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        handle.remove()
        names = [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]
        for name in names:  # one after another: each packed weight is freed before the next layer
            model.set_submodule(name, _unpacked_layer(model.get_submodule(name)))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)


def _unpacked_layer(layer: Any) -> nn.Linear:
    """The layer as a plain linear layer, with the remaining tensors of its layout."""
    scale = layer.tensors[0]
    dtype = scale.dtype if scale.dtype.itemsize > 1 else torch.bfloat16
    linear_layer = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
    linear_layer.weight = nn.Parameter(layer.whole(dtype), requires_grad=False)
    if layer.bias is not None:
        linear_layer.bias = nn.Parameter(layer.bias, requires_grad=False)
    for name in layer.names:
        if name not in ("weight", "weight_packed"):
            linear_layer.register_buffer(name, getattr(layer, name))
    return linear_layer
