"""Stand-ins for layers whose weights are packed: the tensors of their layout, and a product that no kernel computes.

They are for fake tensors. A product is one operator, as a library's kernel is: it makes its result, and what such a
kernel holds meanwhile is its own scratch, which a rehearsal does not know.
"""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("harness::packed_product", mutates_args=())
def product(taken: Tensor, packed: list[Tensor], shape: list[int], flops: int) -> Tensor:
    """What `taken` times the weight in `packed` would be: a tensor of `shape`, by so many operations."""
    raise NotImplementedError("packed weights are computed with by their own library")


@product.register_fake
def _(taken: Tensor, packed: list[Tensor], shape: list[int], flops: int) -> Tensor:
    return taken.new_empty(shape)


@torch.library.custom_op("harness::unpacked", mutates_args=())
def unpacked(packed: list[Tensor], out: int, into: int, dtype: torch.dtype) -> Tensor:
    """The weight in `packed`, whole: [out, into]."""
    raise NotImplementedError("packed weights are made whole by their own library")


@unpacked.register_fake
def _(packed: list[Tensor], out: int, into: int, dtype: torch.dtype) -> Tensor:
    return packed[0].new_empty(out, into, dtype=dtype)


@register_flop_formula(torch.ops.harness.packed_product, get_raw=True)
def _flops(taken: Tensor, packed: Any, shape: Any, flops: int, *args: Any, **kwargs: Any) -> int:
    return flops


class PackedLinear(nn.Module):
    """A layer from `into` to `out` that has the `tensors` of its layout as buffers, and the bias that it had.

    Where it `copies`, its library makes the weight whole at each product, outside of any kernel.
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
        """Those of its layout."""
        return [getattr(self, name) for name in self.names]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Its weight: [out, into]."""
        made: Tensor = unpacked(self.tensors, self.out_features, self.in_features, dtype)
        return made

    def forward(self, taken: Tensor) -> Tensor:
        """[..., into] to [..., out]."""
        if self.norm is not None:
            taken = self.norm(taken)
        if self.copies:
            return nn.functional.linear(taken, self.whole(taken.dtype), self.bias)
        parts = self.tensors if self.bias is None else [*self.tensors, self.bias]
        flops = 2 * taken.numel() * self.out_features
        made: Tensor = product(taken, parts, [*taken.shape[:-1], self.out_features], flops)
        return made


class FusedExperts(nn.Module):
    """Experts as one kernel for each of two products, which picks the tokens of each expert and gates what it made.

    The layouts of the two are `up`, from H to 2 I, and `down`, from I to H.
    """

    def __init__(self, up: Mapping[str, Tensor], down: Mapping[str, Tensor], inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.up, self.down = [f"gate_up_proj_{name}" for name in up], [f"down_proj_{name}" for name in down]
        for name, tensor in zip([*self.up, *self.down], [*up.values(), *down.values()], strict=True):
            self.register_buffer(name, tensor)

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Of T tokens [T, H], each with k `experts` [T, k] and their `weights`, to [T, H]."""
        rows, width = experts.numel(), hidden.shape[-1]
        up, down = ([getattr(self, name) for name in names] for names in (self.up, self.down))
        gated = product(hidden, up, [rows, self.inner], 4 * rows * width * self.inner)
        made: Tensor = product(gated, down, [*hidden.shape], 2 * rows * width * self.inner)
        return made


def group_products(experts: nn.Module) -> None:
    """Have transformers' `FP8Experts` do its products by the stand-in, and the rest as its grouped forward does."""
    experts.forward = MethodType(_grouped, experts)


def _grouped(self: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Of T tokens [T, H], each with k `experts` [T, k] and their `weights`, to [T, H]: S = T k rows between."""
    tokens, picked = experts.shape
    rows, width, inner = tokens * picked, hidden.shape[-1], self.intermediate_dim
    order = torch.sort(experts.reshape(-1))[1]
    chosen = hidden[order // picked]  # [S, H]
    name, columns = ("gate_up_proj", 2 * inner) if self.has_gate else ("up_proj", inner)
    made = product(chosen, _pair(self, name), [rows, columns], 2 * rows * width * columns)
    made = self._apply_gate(made) if self.has_gate else self.act_fn(made)  # [S, I]
    made = product(made, _pair(self, "down_proj"), [rows, width], 2 * rows * width * inner)
    made = made * weights.reshape(-1)[order].to(made.dtype).unsqueeze(-1)
    made = made[torch.argsort(order)]
    added: Tensor = made.view(tokens, picked, width).sum(dim=1)
    return added.to(hidden.dtype)


def _pair(experts: nn.Module, name: str) -> list[Tensor]:
    return [getattr(experts, name), getattr(experts, f"{name}_scale_inv")]


def make_whole_at_first(model: nn.Module) -> None:
    """Have each layer that is packed be made whole when `model` first computes, before all else, and stay so."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        handle.remove()
        names = [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]
        for name in names:  # one after another, and what is packed of it goes
            model.set_submodule(name, _made_whole(model.get_submodule(name)))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)


def _made_whole(layer: Any) -> nn.Linear:
    """It as a plain layer, with what is left of its layout."""
    scale = layer.tensors[0]
    dtype = scale.dtype if scale.dtype.itemsize > 1 else torch.bfloat16
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
    made.weight = nn.Parameter(layer.whole(dtype), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias, requires_grad=False)
    for name in layer.names:
        if name not in ("weight", "weight_packed"):
            made.register_buffer(name, getattr(layer, name))
    return made
