"""Attention of `measured_heldout.csv`."""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.measured_rows import CUDA, Measure, Row, on_states


class Neighborhood(nn.Module):
    """Attention of each token to its neighbours by a mask of all pairs: (B, L, H) to (B, L, H).

    The script marks each pair by a statement of its own, which allocates nothing on a GPU: that is left out.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.features = heads, width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        batch, length, width = states.shape
        query, key, value = self.query(states), self.key(states), self.value(states)
        query = query.view(batch, length, self.heads, self.features).transpose(1, 2)
        key = key.view(batch, length, self.heads, self.features).transpose(1, 2)
        value = value.view(batch, length, self.heads, self.features).transpose(1, 2)
        scores = torch.matmul(query, key.transpose(-2, -1)) * (1.0 / sqrt(self.features))
        mask = torch.zeros(length, length, device=states.device, dtype=torch.bool)
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        output = torch.matmul(weights, value)
        output = output.transpose(1, 2).contiguous().view(batch, length, width)
        return self.out(output)  # type: ignore[no-any-return]


def neighborhood(row: Row, measure: Measure) -> int:
    """`Neighborhood` and a backward that keeps its graph; Liger's layer has weights of the same sizes."""
    width, heads = row.size("hidden_size"), row.size("num_heads")
    _liger, layer = (Neighborhood(width, heads).to(CUDA).to(row.dtype) for _ in range(2))
    return on_states(layer, (row.size("batch_size"), row.size("seq_len"), width), row, measure)


class MultiToken(nn.Module):
    """A convolution over the probabilities of a causal softmax: (B, C, L, L) to (B, C, L, L)."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        into, out, kernel = (row.size(name) for name in ("C_in", "C_out", "K"))
        self.weight = nn.Parameter(torch.empty(out, into, kernel, kernel, dtype=row.dtype, device=CUDA))
        self.bias = nn.Parameter(torch.empty(out, dtype=row.dtype, device=CUDA))
        self.padding = kernel // 2

    def forward(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        mask = torch.tril(torch.ones(length, length, dtype=torch.bool, device=CUDA)).view(
            1, 1, length, length
        )
        low = torch.tensor(-1e9, device=CUDA, dtype=scores.dtype)
        zero = torch.tensor(0.0, device=CUDA, dtype=scores.dtype)
        masked = scores.masked_fill(~mask, low)
        probabilities = functional.softmax(masked, dim=-1)
        output = functional.conv2d(probabilities, self.weight, self.bias, stride=1, padding=self.padding)
        return output.masked_fill(~mask, zero)


class SparseMultiToken(MultiToken):
    """The same over a causal sparsemax."""

    def forward(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        mask = torch.tril(torch.ones(length, length, dtype=torch.bool, device=CUDA)).view(
            1, 1, length, length
        )
        low = torch.tensor(-1e9, device=CUDA, dtype=torch.float32)
        zero = torch.tensor(0.0, device=CUDA, dtype=torch.float32)
        computed = scores.to(torch.float32)
        masked = computed.masked_fill(~mask, low)
        ordered, _order = torch.sort(masked, dim=-1, descending=True)
        sums = torch.cumsum(ordered, dim=-1)
        places = torch.arange(1, length + 1, device=CUDA, dtype=torch.float32).view(1, 1, 1, length)
        positive = ordered > -1e8
        condition = (1 + places * ordered > sums) & positive
        size = torch.sum(condition, dim=-1, keepdim=True)
        safe_size = torch.max(size, torch.ones_like(size))
        chosen = torch.gather(sums, dim=-1, index=safe_size.long() - 1)
        threshold = (chosen - 1) / safe_size.to(torch.float32)
        threshold = torch.where(size == 0, torch.full_like(threshold, float("inf")), threshold)
        probabilities = torch.clamp(masked - threshold, min=0)
        weight, bias = self.weight.to(torch.float32), self.bias.to(torch.float32)
        output = functional.conv2d(probabilities, weight, bias, stride=1, padding=self.padding)
        return output.masked_fill(~mask, zero).to(scores.dtype)


def multi_token(row: Row, measure: Measure) -> int:
    """`MultiToken`; Liger's layer has a weight and a bias of the same sizes."""
    return tokens(MultiToken, row, measure)


def sparse_multi_token(row: Row, measure: Measure) -> int:
    """`SparseMultiToken`; Liger's layer has a weight and a bias of the same sizes."""
    return tokens(SparseMultiToken, row, measure)


def tokens(layer: type[MultiToken], row: Row, measure: Measure) -> int:
    """A layer on scores (B, C, L, L)."""
    _liger = layer(row)
    length = row.size("L")
    return on_states(layer(row), (row.size("B"), row.size("C_in"), length, length), row, measure)
