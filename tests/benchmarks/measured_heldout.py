"""Layers of `measured_heldout.csv`, the rows that nobody looked at while the rules were written.

As `measured_kernels.py`. `PROGRAMS` has all of them, with the losses of `measured_heldout_losses.py` and the attention
of `measured_heldout_attention.py`.
"""

from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.benchmarks.measured_rows import CUDA, Measure, Row, in_mode, on_states


class AddedRMSNorm(nn.Module):
    """An RMS norm in float32 of states and a residual, and their sum: two of (M, H) to two of (M, H)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        dtype = states.dtype
        states = states.to(torch.float32)
        residual = residual.to(torch.float32)
        states = states + residual
        residual = states
        variance = states.pow(2).mean(-1, keepdim=True)
        states = states * torch.rsqrt(variance + self.eps)
        return self.weight * states.to(dtype), residual.to(dtype)


def fused_add_rms_norm(row: Row, measure: Measure) -> int:
    """`AddedRMSNorm`, with gradients of both results; the weights of Liger's two norms are alive too."""
    width = row.size("H")
    _liger = [nn.RMSNorm(width).to(CUDA) for _ in range(3)]
    layer = AddedRMSNorm(width, row.config["eps"]).to(CUDA)
    states, residual = (torch.randn(row.size("M"), width, dtype=row.dtype, device=CUDA) for _ in range(2))
    gradients = torch.randn_like(states), torch.randn_like(residual)
    for each in (states, residual):
        each.requires_grad_(True)

    def full() -> None:
        outputs = layer(states, residual)
        torch.autograd.backward(outputs, gradients)

    return measure(full)


def group_norm(row: Row, measure: Measure) -> int:
    """`nn.GroupNorm` of (M, C, H); the script measures forward and backward together in every mode."""
    channels, eps = row.size("C"), row.config["eps"]
    groups = channels // row.size("channels_per_group")
    _liger = nn.GroupNorm(groups, channels, eps=eps).to(CUDA)
    layer = nn.GroupNorm(groups, channels, eps=eps).to(CUDA)
    return on_states(layer, (row.size("M"), channels, row.size("H")), row, measure)


def llama4_rope(row: Row, measure: Measure) -> int:
    """transformers' complex rotation of Llama 4, with the angles as transformers 4.5x computed them: by a product."""
    length, heads = row.size("seq_len" if "seq_len" in row.config else "T"), row.size("num_q_heads")
    width = row.size("hidden_size" if "hidden_size" in row.config else "H") // heads

    def states(count: int) -> Tensor:
        return torch.randn((1, length, count, width), device=CUDA, requires_grad=True, dtype=row.dtype)

    inverse = 1.0 / (10000.0 ** (torch.arange(0, width, 2, dtype=torch.int64).to(CUDA).float() / width))
    query, key = states(heads), states(row.size("num_kv_heads"))
    gradients = torch.randn_like(query), torch.randn_like(key)
    positions = torch.arange(length, device=CUDA).unsqueeze(0)
    with torch.no_grad():
        rotations = complex_rotations(inverse, positions)

    def full() -> None:
        outputs = rotated(query, key, rotations)
        torch.autograd.grad(outputs, (query, key), gradients, allow_unused=True, retain_graph=True)

    return measure(full)


def complex_rotations(inverse: Tensor, positions: Tensor) -> Tensor:
    """e^(i m f) of `positions` m (1, T) and inverse frequencies f (D / 2,): complex64 (1, T, D / 2)."""
    angles = (inverse[None, :, None] @ positions[:, None, :].float()).transpose(1, 2)
    return torch.polar(torch.ones_like(angles), angles) * 1.0


def rotated(query: Tensor, key: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' `apply_rotary_emb` of Llama 4: its pairs of features as complex numbers, in float32."""
    complex_query, complex_key = (
        torch.view_as_complex(each.float().reshape(*each.shape[:-1], -1, 2)) for each in (query, key)
    )
    query_out = torch.view_as_real(complex_query * rotations[:, :, None, :]).flatten(3)
    key_out = torch.view_as_real(complex_key * rotations[:, :, None, :]).flatten(3)
    return query_out.type_as(query), key_out.type_as(key)


def megatron_swiglu(row: Row, measure: Measure) -> int:
    """SiLU of one half times the other half, as PyTorch runs it."""

    def swiglu(states: Tensor) -> Tensor:
        gate, up = torch.chunk(states, 2, -1)
        return functional.silu(gate) * up

    return gated(row, measure, swiglu)


class FusedSwiGLU(torch.autograd.Function):
    """Megatron's: its forward and its backward are compiled, and here a kernel each, with no memory but its result."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        return states.new_empty(*states.shape[:-1], states.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (states,) = ctx.saved_tensors
        return torch.empty_like(states)


def megatron_swiglu_fused(row: Row, measure: Measure) -> int:
    """`FusedSwiGLU`, on states whose sequence and batch are one axis."""

    def swiglu(states: Tensor) -> Tensor:
        output: Tensor = FusedSwiGLU.apply(states.view(-1, states.shape[-1]))
        return output.view(*states.shape[:2], -1)

    return gated(row, measure, swiglu)


def gated(row: Row, measure: Measure, swiglu: Any) -> int:
    """Forward and backward of `swiglu`'s sum, without a gradient from before."""
    shape = (row.size("S"), row.size("B"), 2 * row.size("ffn_local"))
    states = torch.randn(shape, device=CUDA, dtype=torch.bfloat16, requires_grad=True)

    def full() -> None:
        states.grad = None
        output = swiglu(states)
        output.sum().backward()

    return measure(full)


def sparsemax(row: Row, measure: Measure) -> int:
    """Sparsemax of each row of (B * T, V), from sorted values and their sums."""
    shape = (row.size("B") * row.size("T"), row.size("V"))
    states = torch.randn(shape, dtype=row.dtype, device=CUDA)
    gradient = torch.randn_like(states)
    states.requires_grad_(True)

    def forward() -> Tensor:
        ordered, _order = torch.sort(states, dim=1, descending=True)
        sums = torch.cumsum(ordered, dim=1)
        places = torch.arange(1, shape[1] + 1, device=CUDA, dtype=row.dtype).view(1, -1)
        bound = 1 + places * ordered
        support = bound > sums
        size = support.sum(dim=1, keepdim=True).clamp(min=1)
        total = (ordered * support).sum(dim=1, keepdim=True)
        threshold = (total - 1) / size
        return torch.clamp(states - threshold, min=0)

    def full() -> None:
        output = forward()
        output.backward(gradient, retain_graph=True)

    return measure(full)


def tiled_mlp(row: Row, measure: Measure) -> int:
    """DeepSpeed's `TiledMLP` around transformers' `LlamaMLP`: the script has a copy of it."""
    hidden = row.size("hidden_size")
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=row.size("intermediate_size"),
        hidden_act=row.config["hidden_act"],
    )
    states = torch.randn(
        row.size("bsz"), row.size("T"), hidden, device=CUDA, dtype=row.dtype, requires_grad=True
    )
    layer = LlamaMLP(config).to(CUDA).to(row.dtype)
    weights = [layer.down_proj.weight, layer.gate_proj.weight, layer.up_proj.weight]

    def forward() -> Tensor:
        shards = row.size("num_shards")
        return TiledMLP.apply(LlamaMLP.forward, layer, states, shards, weights)  # type: ignore[no-any-return]

    return in_mode(row, measure, forward)
