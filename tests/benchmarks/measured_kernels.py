"""Layers of `measured_operators.csv`: what each benchmark's script built, and the call whose peak it printed.

Each function takes a row and `measure`. It builds what the script built at the time of the row (shapes, dtypes,
modules, what its frame keeps alive) and hands `measure` the call. A name that begins with `_` is alive in the script,
for the other provider.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from tests.benchmarks.measured_rows import CUDA, Measure, Row, in_mode, on_states


def embedding(row: Row, measure: Measure) -> int:
    """`nn.Embedding`, with what `torch.compile` had left alive in that process."""
    _left = left_by_compile(row)
    return embedding_alone(row, measure)


def embedding_alone(row: Row, measure: Measure) -> int:
    """`nn.Embedding`, in a process of its own."""
    rows, width = row.size("V"), row.size("D")
    layer = nn.Embedding(rows, width).to(CUDA).to(row.dtype)
    _liger = nn.Embedding(rows, width).to(CUDA).to(row.dtype)
    indices = torch.randint(0, rows, (row.size("B"), row.size("T")), device=CUDA)

    def full() -> None:
        output = layer(indices)
        output.backward(torch.randn_like(output))

    return measure(full)


VOCABULARIES = [2**power for power in range(10, 18)]
"""Rows of the embeddings that its benchmark goes through."""
BERT, LLAMA = 768, 4096
"""Their widths, in the order in which the benchmark takes them."""


def left_by_compile(row: Row) -> list[nn.Embedding]:
    """The embeddings that the script ran under `torch.compile` before it measured this row, and never freed.

    First the speed of forward and of full, then the memory of full, each with all sizes of BERT and then of LLaMA; only
    a full leaves gradients. When LLaMA's speed was measured, BERT's were gone.
    """
    runs = [(LLAMA, False), (LLAMA, True), *([(BERT, True)] if row.size("D") == LLAMA else [])]
    left = []
    for width, with_gradient in runs:
        for rows in VOCABULARIES:
            layer = nn.Embedding(rows, width, device=CUDA)
            if with_gradient:
                layer.weight.grad = torch.empty_like(layer.weight)
            left.append(layer)
    return left


def gated_mlp(row: Row, measure: Measure) -> int:
    """transformers' `LlamaMLP`."""
    hidden = row.size("hidden_size")
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=row.size("intermediate_size"),
        hidden_act=row.config["hidden_act"],
    )
    batch = row.size("bsz" if "bsz" in row.config else "B")
    states = torch.randn(batch, row.size("T"), hidden, device=CUDA, dtype=row.dtype, requires_grad=True)
    layer = LlamaMLP(config).to(CUDA).to(row.dtype)
    return in_mode(row, measure, lambda: layer(states))


def layer_norm(row: Row, measure: Measure) -> int:
    """`nn.LayerNorm`."""
    width = row.size("N")
    _liger = nn.LayerNorm(width).to(CUDA)
    return on_states(
        nn.LayerNorm(width, eps=row.config["eps"]).to(CUDA), (row.size("M"), width), row, measure
    )


def rms_norm(row: Row, measure: Measure) -> int:
    """transformers' `LlamaRMSNorm`, with a float32 weight on bfloat16."""
    width = row.size("H")
    _liger = LlamaRMSNorm(width).to(CUDA)
    return on_states(
        LlamaRMSNorm(width, eps=row.config["eps"]).to(CUDA), (row.size("M"), width), row, measure
    )


def megatron_rms_norm(row: Row, measure: Measure) -> int:
    """`nn.RMSNorm`."""
    width = row.size("H")
    layer = nn.RMSNorm(width, eps=1e-6).to(CUDA).to(torch.bfloat16)
    states = torch.randn(
        row.size("S"), row.size("B"), width, device=CUDA, dtype=torch.bfloat16, requires_grad=True
    )

    def full() -> None:
        output = layer(states)
        output.sum().backward()

    return measure(full)


def rope(row: Row, measure: Measure) -> int:
    """transformers' `apply_rotary_pos_emb`, with the angles as transformers 4.44 computed them: by a product."""
    length, heads = row.size("T" if row.x_name == "T" else "seq_len"), row.size("num_q_heads")
    width = row.size("H" if row.x_name == "H" else "hidden_size") // heads

    def states(count: int) -> Tensor:
        shape = (1, length, count, width)
        return torch.randn(shape, device=CUDA, requires_grad=True, dtype=row.dtype).transpose(1, 2)

    frequencies = 1.0 / (10000.0 ** (torch.arange(0, width, 2, device=CUDA).float() / width))
    query, key = states(heads), states(row.size("num_kv_heads"))
    gradients = torch.randn_like(query), torch.randn_like(key)
    positions = torch.arange(length, device=CUDA).unsqueeze(0)
    cos, sin = angles(frequencies, positions, row.dtype)

    def full() -> None:
        outputs = apply_rotary_pos_emb(query, key, cos, sin)
        torch.autograd.grad(outputs, (query, key), gradients, allow_unused=True, retain_graph=True)

    return measure(full)


@torch.no_grad()
def angles(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions` (1, T), each (1, T, width)."""
    products = (frequencies[None, :, None] @ positions[:, None, :].float()).transpose(1, 2)
    both = torch.cat((products, products), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def softmax(row: Row, measure: Measure) -> int:
    """`nn.Softmax` of a vector of N elements: of `M` the script makes no use."""
    return vector(row, measure, nn.Softmax(dim=-1))


def relu_squared(row: Row, measure: Measure) -> int:
    """The square of ReLU, of a vector of N elements: of `M` the script makes no use."""
    return vector(row, measure, lambda states: torch.square(functional.relu(states)))


def vector(row: Row, measure: Measure, function: Callable[[Tensor], Tensor]) -> int:
    """Forward and backward of `function`, on a vector."""
    states = torch.randn(row.size("N"), device=CUDA, dtype=row.dtype, requires_grad=True)

    def full() -> None:
        output = function(states)
        output.backward(torch.ones_like(output), retain_graph=True)

    return measure(full)
