"""The programs whose memory Liger-Kernel's benchmarks measured, in plain PyTorch and transformers.

Each function takes a row and `measure`: it builds what that benchmark's script built at the time of the row (shapes,
dtypes, modules, what its frame keeps alive), and hands `measure` the call whose peak the script printed. A name that
begins with `_` is alive in the script and used by the other provider alone. `tests/benchmarks/measured.py` runs them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb



Measure = Callable[[Callable[[], object]], int]
"""Bytes: the most that was allocated within a call."""
CUDA = "cuda"


class Row(NamedTuple):
    """A line of `measured_operators.csv`; `config` are the sizes that are the same for all of `x_name`'s values."""

    kernel: str
    provider: str
    mode: str
    x_name: str
    x_value: int
    peak_mib: float
    config: dict[str, Any]
    gpu: str
    date: str
    version: str

    def size(self, name: str) -> int:
        """The size `name` of the benchmark's configuration, which may be the one that the rows vary."""
        return self.x_value if name == self.x_name else int(self.config[name])

    @property
    def dtype(self) -> torch.dtype:
        """Raises KeyError where the benchmark has no such setting."""
        return {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[self.config["dtype"]]


def in_mode(row: Row, measure: Measure, forward: Callable[[], Tensor]) -> int:
    """Of `forward`, of the backward of a forward done before, or of both; each backward keeps its graph."""
    if row.mode == "forward":
        return measure(forward)
    if row.mode == "backward":
        output = forward()
        gradient = torch.randn_like(output)
        return measure(lambda: output.backward(gradient, retain_graph=True))

    def full() -> None:
        output = forward()
        output.backward(torch.randn_like(output), retain_graph=True)

    return measure(full)


def cross_entropy(row: Row, measure: Measure) -> int:
    """`CrossEntropyLoss` of float32 logits."""
    tokens, vocabulary = row.size("B") * row.size("T"), row.size("V")
    loss = nn.CrossEntropyLoss()
    logits = torch.randn(tokens, vocabulary, requires_grad=True, device=CUDA)
    target = torch.randint(vocabulary, (tokens, 1), device=CUDA).squeeze(1)
    return measure(lambda: loss(logits, target).backward())


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


def fused_linear_cross_entropy(row: Row, measure: Measure) -> int:
    """A head of the vocabulary's width and `CrossEntropyLoss`, one after the other."""
    hidden, vocabulary, tokens = row.size("H"), row.size("V"), row.size("BT")
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=row.dtype).to(CUDA)
    _liger = nn.Linear(hidden, vocabulary, bias=False, dtype=row.dtype).to(CUDA)
    loss = nn.CrossEntropyLoss()
    hidden_states = torch.randn(tokens, hidden, requires_grad=True, dtype=row.dtype, device=CUDA)
    target = torch.randint(vocabulary, (tokens, 1), device=CUDA).squeeze(1)

    def forward() -> Tensor:
        logits = head(hidden_states)
        return loss(logits, target)  # type: ignore[no-any-return]

    return measure(lambda: forward().backward())


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
    return norm(row, measure, nn.LayerNorm(width, eps=row.config["eps"]).to(CUDA), width)


def rms_norm(row: Row, measure: Measure) -> int:
    """transformers' `LlamaRMSNorm`, with a float32 weight on bfloat16."""
    width = row.size("H")
    _liger = LlamaRMSNorm(width).to(CUDA)
    return norm(row, measure, LlamaRMSNorm(width, eps=row.config["eps"]).to(CUDA), width)


def norm(row: Row, measure: Measure, layer: nn.Module, width: int) -> int:
    """A norm's forward and backward with a gradient that is there before."""
    states = torch.randn(row.size("M"), width, dtype=row.dtype, device=CUDA)
    gradient = torch.randn_like(states)
    states.requires_grad_(True)

    def full() -> None:
        output = layer(states)
        output.backward(gradient, retain_graph=True)

    return measure(full)


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


def kl_div(row: Row, measure: Measure) -> int:
    """`nn.KLDivLoss` of a log-softmax whose own graph is kept."""
    shape = (row.size("B") * row.size("T"), row.size("V"))
    loss = nn.KLDivLoss(reduction="batchmean")
    predicted = torch.randn(shape, requires_grad=True, device=CUDA).log_softmax(dim=-1)
    target = torch.randn(shape, device=CUDA).softmax(dim=-1)

    def full() -> None:
        divergence = loss(predicted, target)
        divergence.backward(retain_graph=True)

    return measure(full)


def fused_linear_jsd(row: Row, measure: Measure) -> int:
    """A student's and a teacher's head and the Jensen-Shannon divergence between them, in float32."""
    hidden, vocabulary, tokens = row.size("H"), row.size("V"), row.size("BT")
    student, teacher = (
        nn.Linear(hidden, vocabulary, bias=False, dtype=row.dtype, device=CUDA) for _ in range(2)
    )
    divergence = nn.KLDivLoss(reduction="batchmean", log_target=True)
    states = torch.rand(tokens, hidden, requires_grad=True, dtype=row.dtype, device=CUDA)
    teacher_states = torch.rand(tokens, hidden, dtype=row.dtype, device=CUDA)

    def forward() -> Tensor:
        student_logits = student(states)
        teacher_logits = teacher(teacher_states)
        log_q = torch.log_softmax(student_logits / 1.0, dim=-1)
        log_p = torch.log_softmax(teacher_logits / 1.0, dim=-1)
        return jensen_shannon(divergence, log_q, log_p).to(row.dtype)

    def full() -> None:
        loss = forward()
        loss.backward()

    return measure(full)


def jensen_shannon(divergence: nn.KLDivLoss, log_q_low: Tensor, log_p_low: Tensor) -> Tensor:
    """Of two log-probabilities (N, V), whose lower precision the caller keeps alive."""
    log_p, log_q = log_p_low.to(torch.float), log_q_low.to(torch.float)
    mean = torch.lerp(torch.exp(log_p), torch.exp(log_q), 0.5)
    halves = 0.5 * divergence(torch.log(mean), log_p) + 0.5 * divergence(torch.log(mean), log_q)
    return halves  # type: ignore[no-any-return]


def token_log_probabilities(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """The mean log-probability of each sequence's labels: (B, T, V) and (B, T) to (B,)."""
    mask = labels != ignored
    indices = torch.where(labels == ignored, 0, labels)
    chosen = torch.gather(logits.log_softmax(-1), dim=2, index=indices.unsqueeze(2)).squeeze(2)
    return (chosen * mask).sum(-1) / mask.sum(-1)


def fused_linear_orpo_loss(row: Row, measure: Measure) -> int:
    """TRL's ORPO loss from a head's logits: the first half of the batch is chosen, the second rejected."""
    batch, length, hidden, vocabulary = (row.size(name) for name in ("B", "T", "H", "V"))
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=row.dtype).to(CUDA)
    _liger = nn.Linear(hidden, vocabulary, bias=False, dtype=row.dtype).to(CUDA)
    states = torch.randn(batch, length, hidden, requires_grad=True, dtype=row.dtype, device=CUDA)
    target = torch.randint(vocabulary, (batch, length), device=CUDA)

    def forward() -> Tensor:
        output = states @ head.weight.t()
        logits = output.float()
        half = batch // 2
        likelihood = functional.cross_entropy(logits[:half].view(-1, vocabulary), target[:half].view(-1))
        log_probabilities = token_log_probabilities(logits, target, -100)
        del output, logits
        chosen, rejected = log_probabilities[:half], log_probabilities[half:]
        odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
        return likelihood - (0.1 * functional.logsigmoid(odds)).mean()

    def full() -> None:
        loss = forward()
        loss.backward()

    return measure(full)


def kto_loss(row: Row, measure: Measure) -> int:
    """TRL's KTO loss from the logits of a policy's and a reference's head, with biases.

    Which sequences are desired is random and has no seed: here it is half of them. No size depends on it but of a few
    hundred bytes, as the chosen and the rejected are the whole batch together.
    """
    batch, length, hidden, vocabulary = (row.size(name) for name in ("B", "T", "H", "V"))
    head, reference, _liger, _liger_reference = (
        nn.Linear(hidden, vocabulary, dtype=row.dtype).to(CUDA) for _ in range(4)
    )
    states = torch.randn(batch, length, hidden, device=CUDA, dtype=row.dtype)
    target = torch.randint(vocabulary, (batch, length), device=CUDA)
    _labels = torch.randint(2, (batch,), device=CUDA).bool()
    divergence = torch.randn(1, device=CUDA, dtype=row.dtype)
    reference_states = torch.randn(batch, length, hidden, device=CUDA, dtype=row.dtype)
    desired, undesired = torch.arange(batch, device=CUDA).chunk(2)
    ignored, beta = int(row.config["ignore_index"]), float(row.config["beta"])

    def log_probabilities_of(logits: Tensor) -> tuple[Tensor, Tensor]:
        every = token_log_probabilities(logits, target, ignored)
        return every[desired], every[undesired]

    @torch.no_grad()
    def of_reference() -> tuple[Tensor, Tensor]:
        logits = reference_states @ reference.weight.t()
        logits = logits + reference.bias
        return log_probabilities_of(logits)

    def policy() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = states @ head.weight.t()
        output = output + head.bias
        logits = output.float()
        return *log_probabilities_of(logits), logits[desired], logits[undesired]

    def forward() -> Tensor:
        chosen, rejected, *logits = policy()
        reference_chosen, reference_rejected = of_reference()
        gain, loss = chosen - reference_chosen, rejected - reference_rejected
        losses = torch.cat(
            (
                1 - functional.sigmoid(beta * (gain - divergence)),
                1 - functional.sigmoid(beta * (divergence - loss)),
            )
        )
        _sums = [each.detach().sum() for each in logits]
        return losses.mean()

    def full() -> None:
        loss = forward()
        loss.backward()

    return measure(full)


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
