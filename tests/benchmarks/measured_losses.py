"""Losses of `measured_operators.csv`, most of them behind a head as wide as the vocabulary."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.measured_rows import CUDA, Measure, Row


def cross_entropy(row: Row, measure: Measure) -> int:
    """`CrossEntropyLoss` of float32 logits."""
    tokens, vocabulary = row.size("B") * row.size("T"), row.size("V")
    loss = nn.CrossEntropyLoss()
    logits = torch.randn(tokens, vocabulary, requires_grad=True, device=CUDA)
    target = torch.randint(vocabulary, (tokens, 1), device=CUDA).squeeze(1)
    return measure(lambda: loss(logits, target).backward())


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
    first = 0.5 * divergence(torch.log(mean), log_p)
    second = 0.5 * divergence(torch.log(mean), log_q)
    return first + second  # type: ignore[no-any-return]


def token_log_probabilities(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """The mean log-probability of each sequence's labels: (B, T, V) and (B, T) to (B,)."""
    mask = labels != ignored
    indices = torch.where(labels == ignored, 0, labels)
    chosen = torch.gather(logits.log_softmax(-1), dim=2, index=indices.unsqueeze(2)).squeeze(2)
    return (chosen * mask).sum(-1) / mask.sum(-1)


COMMITTED_LENGTH = 1024


def fused_linear_orpo_loss(row: Row, measure: Measure) -> int:
    """TRL's ORPO loss from a head's logits: the first half of the batch is chosen, the second rejected.

    The script in the repository has sequences of 1,024 tokens, and logits in float32. No script of the other rows is
    there: each of their logits takes half the bytes, so that theirs were in bfloat16.
    """
    batch, length, hidden, vocabulary = (row.size(name) for name in ("B", "T", "H", "V"))
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=row.dtype).to(CUDA)
    _liger = nn.Linear(hidden, vocabulary, bias=False, dtype=row.dtype).to(CUDA)
    states = torch.randn(batch, length, hidden, requires_grad=True, dtype=row.dtype, device=CUDA)
    target = torch.randint(vocabulary, (batch, length), device=CUDA)

    def forward() -> Tensor:
        output = states @ head.weight.t()
        logits = output.float() if length == COMMITTED_LENGTH else output
        half = batch // 2
        likelihood = functional.cross_entropy(logits[:half].view(-1, vocabulary), target[:half].view(-1))
        log_probabilities = token_log_probabilities(logits, target, -100)
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
