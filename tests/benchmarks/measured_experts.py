"""The experts of `measured_operators.csv`, and which tokens each of them got."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tests.benchmarks.measured_rows import CUDA, Measure, Row, in_mode
from tests.benchmarks.philox import Generator

SEED = 42
MULTIPROCESSORS = {"NVIDIA H100 80GB HBM3": 132}


def fused_moe(row: Row, measure: Measure) -> int:
    """The loop over experts that transformers' MoE blocks had, with expert weights of which a leaf is alive too."""
    tokens, experts, hidden, width, chosen = (
        row.size(name) for name in ("T", "E", "H", "intermediate_dim", "K")
    )

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=row.dtype, device=CUDA, requires_grad=True)

    states = leaf(tokens, hidden)
    gate_up = leaf(experts, 2 * width, hidden) * 0.02
    down = leaf(experts, hidden, width) * 0.02
    logits = torch.randn(tokens, experts, device=CUDA)
    indices = torch.topk(logits, chosen, dim=-1).indices.to(torch.int32)
    weights = torch.softmax(torch.gather(logits, 1, indices.long()), dim=-1).to(row.dtype)
    weights.requires_grad_(True)
    del logits
    loads = tokens_of_experts(row)

    def forward() -> Tensor:
        output = torch.zeros_like(states)
        with torch.no_grad():
            mask = one_hot(indices.long(), experts).permute(2, 1, 0)
            _hit = nonzero(torch.greater(mask.sum(dim=(-1, -2)), 0), experts)
        for expert, load in enumerate(loads):
            places, token = nonzero(mask[expert], load)
            current = states[token]
            gate, up = functional.linear(current, gate_up[expert]).chunk(2, dim=-1)
            current = functional.silu(gate) * up
            current = functional.linear(current, down[expert])
            current = current * weights[token, places, None]
            output.index_add_(0, token, current.to(output.dtype))
        return output

    return in_mode(row, measure, forward)


def tokens_of_experts(row: Row) -> list[int]:
    """How many tokens the benchmark's router sent to each expert: it drew its logits after the seed 42."""
    tokens, experts, hidden, width = (row.size(name) for name in ("T", "E", "H", "intermediate_dim"))
    generator = Generator(SEED, MULTIPROCESSORS[row.gpu])
    for count in (tokens * hidden, experts * 2 * width * hidden, experts * hidden * width):
        generator.skip(count)
    logits = generator.normals(tokens * experts).reshape(tokens, experts)
    best = np.argpartition(-logits, row.size("K") - 1, axis=1)[:, : row.size("K")]
    return [int(load) for load in np.bincount(best.ravel(), minlength=experts)]


def one_hot(indices: Tensor, classes: int) -> Tensor:
    """As `functional.one_hot` is on CUDA: it looks at no value."""
    zeros = torch.zeros(*indices.shape, classes, dtype=torch.long, device=indices.device)
    return zeros.scatter_(-1, indices.unsqueeze(-1), 1)


def nonzero(mask: Tensor, count: int) -> tuple[Tensor, ...]:
    """As `mask.nonzero(as_tuple=True)` of a mask with `count` true values."""
    return torch.empty(mask.dim(), count, dtype=torch.long, device=mask.device).unbind(0)
