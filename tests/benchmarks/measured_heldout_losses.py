"""Losses of `measured_heldout.csv`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.measured_losses import token_log_probabilities
from tests.benchmarks.measured_rows import CUDA, Measure, Row, in_mode


def of_distributions(row: Row, activation: str) -> tuple[Tensor, Tensor]:
    """A predicted distribution (N, V) whose own graph is kept, and a target, both by `activation`."""
    shape = (row.size("B") * row.size("T"), row.size("V"))
    predicted = getattr(torch.randn(shape, requires_grad=True, device=CUDA), activation)(dim=-1)
    target = getattr(torch.randn(shape, device=CUDA), activation)(dim=-1)
    return predicted, target


def full_with_graph(measure: Measure, forward: Callable[[], Tensor]) -> int:
    """Of `forward` and a backward that keeps its graph."""

    def full() -> None:
        loss = forward()
        loss.backward(retain_graph=True)

    return measure(full)


def jsd_of_2024(row: Row, measure: Measure) -> int:
    """The Jensen-Shannon divergence by two `nn.KLDivLoss`."""
    divergence = nn.KLDivLoss(reduction="batchmean", log_target=True)
    predicted, target = of_distributions(row, "log_softmax")

    def forward() -> Tensor:
        log_p, log_q = (each.view(-1, each.shape[-1]) for each in (predicted, target))
        mean = 0.5 * (torch.exp(log_p) + torch.exp(log_q))
        log_mean = torch.log(mean)
        loss: Tensor = 0.5 * (divergence(log_mean, log_p) + divergence(log_mean, log_q))
        return loss

    return full_with_graph(measure, forward)


def jsd_of_2026(row: Row, measure: Measure) -> int:
    """The same without a mean in `nn.KLDivLoss`, the logarithm of the mixture taken twice."""
    divergence = nn.KLDivLoss(reduction="none", log_target=True)
    shape = (row.size("BT"), row.size("vocab_size"))
    predicted = torch.randn(shape, requires_grad=True, device=CUDA).log_softmax(dim=-1)
    target = torch.randn(shape, device=CUDA).log_softmax(dim=-1)

    def forward() -> Tensor:
        log_p, log_q = target.to(torch.float), predicted.to(torch.float)
        log_p, log_q = (each.view(-1, each.shape[-1]) for each in (log_p, log_q))
        mixture = torch.lerp(torch.exp(log_q), torch.exp(log_p), 0.5)
        loss = 0.5 * divergence(torch.log(mixture), log_p).sum(dim=-1) + 0.5 * divergence(
            torch.log(mixture), log_q
        ).sum(dim=-1)
        loss = (loss / shape[0]).sum()
        return loss.to(torch.float)  # type: ignore[no-any-return]

    return in_mode(row, measure, forward)


def tvd(row: Row, measure: Measure) -> int:
    """The total variation distance of two distributions."""
    predicted, target = of_distributions(row, "softmax")

    def forward() -> Tensor:
        distance = torch.abs(predicted - target) / 2.0
        return torch.sum(distance) / predicted.size(0)

    return full_with_graph(measure, forward)


def preference(row: Row, measure: Measure, margin: float) -> int:
    """TRL's CPO loss from a head's logits, or SimPO's with a margin: the first half of the batch is chosen."""
    batch, length, hidden, vocabulary = (row.size(name) for name in ("B", "T", "H", "V"))
    head, _liger = (nn.Linear(hidden, vocabulary, bias=False, dtype=row.dtype).to(CUDA) for _ in range(2))
    states = torch.randn(batch, length, hidden, requires_grad=True, dtype=row.dtype, device=CUDA)
    target = torch.randint(vocabulary, (batch, length), device=CUDA)
    half, beta = batch // 2, 0.1

    def forward() -> Tensor:
        output = states @ head.weight.t()
        logits = output.float()
        likelihood = functional.cross_entropy(logits[:half].view(-1, vocabulary), target[:half].view(-1))
        every = token_log_probabilities(logits, target, -100)
        return likelihood - of_ratio(every[:half], every[half:]).mean()

    def of_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
        ratio = chosen - rejected
        if margin:
            ratio = ratio - margin / beta
        return functional.logsigmoid(beta * ratio) * 1.0 + functional.logsigmoid(-beta * ratio) * 0.0

    def full() -> None:
        loss = forward()
        loss.backward()

    return measure(full)


cpo, simpo = partial(preference, margin=0.0), partial(preference, margin=0.5)


def grpo(row: Row, measure: Measure) -> int:
    """A GRPO loss against a reference's head, with importance weights of tokens or of sequences."""
    batch, length, hidden, vocabulary = (row.size(name) for name in ("B", "T", "H", "V"))
    heads = [nn.Linear(hidden, vocabulary, bias=False, dtype=row.dtype).to(CUDA) for _ in range(4)]
    head, reference, *_liger = heads
    states = torch.randn(batch, length, hidden, requires_grad=True, dtype=row.dtype, device=CUDA)
    chosen = torch.randint(0, vocabulary, (batch, length), device=CUDA)
    mask = torch.ones(batch, length, device=CUDA)
    advantages = torch.randn(batch, dtype=row.dtype, device=CUDA)
    reference_states = torch.randn(batch, length, hidden, dtype=row.dtype, device=CUDA)

    def forward() -> Tensor:
        logits = states @ head.weight.t()
        log_probabilities = functional.log_softmax(logits.float(), dim=-1)
        tokens = log_probabilities.gather(dim=-1, index=chosen.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            reference_logits = reference_states @ reference.weight.t()
            reference_log_probabilities = functional.log_softmax(reference_logits.float(), dim=-1)
            reference_tokens = reference_log_probabilities.gather(dim=-1, index=chosen.unsqueeze(-1)).squeeze(
                -1
            )
        weights = importance(tokens - tokens.detach())
        clipped = torch.clamp(weights, 0.8, 1.2)
        gains = weights * advantages.unsqueeze(1), clipped * advantages.unsqueeze(1)
        losses = -torch.min(*gains)
        divergence = torch.exp(reference_tokens - tokens) - (reference_tokens - tokens) - 1.0
        losses = losses + 0.1 * divergence
        return (losses * mask).sum() / torch.clamp(mask.sum(), min=1.0)

    def importance(ratio: Tensor) -> Tensor:
        if row.config["importance_sampling_level"] == "sequence":
            ratio = ((ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        return torch.exp(ratio)

    def full() -> None:
        loss = forward()
        loss.backward()

    return measure(full)


Soft = Callable[[Tensor, Tensor], Tensor]


def distill(row: Row, measure: Measure, soft: Soft) -> int:
    """Half a cross entropy of a student's head, half a distance `soft` to the logits of a teacher's head."""
    tokens, hidden, vocabulary = (row.size(name) for name in ("BT", "H", "V"))
    widths = (hidden // 2, hidden, hidden // 2, hidden)
    heads = [nn.Linear(width, vocabulary, bias=False, dtype=row.dtype).to(CUDA) for width in widths]
    student, teacher, *_liger = heads
    tensor = torch.rand(tokens, hidden // 2, device=CUDA, dtype=row.dtype)
    _other, states = (tensor.detach().clone().requires_grad_(True) for _ in range(2))
    teacher_states = torch.rand(tokens, hidden, device=CUDA, dtype=row.dtype)
    target = torch.randint(0, vocabulary, (tokens,), device=CUDA)

    def logits() -> tuple[Tensor, Tensor, Tensor]:
        outputs = states.view(-1, hidden // 2) @ student.weight.t()
        with torch.no_grad():
            teacher_outputs = teacher_states.view(-1, hidden) @ teacher.weight.t()
        of_student = outputs.view(tokens, -1).float()
        of_teacher = teacher_outputs.view(tokens, -1).float()
        torch.all(target == -100)
        loss = nn.CrossEntropyLoss()(of_student.view(-1, vocabulary), target.view(-1))
        return of_student, of_teacher, loss

    def forward() -> Tensor:
        of_student, of_teacher, hard = logits()
        of_student /= 1.0
        of_teacher /= 1.0
        loss = soft(of_student, of_teacher)
        return 0.5 * hard + 0.5 * loss

    def full() -> None:
        loss = forward()
        loss.backward()

    return measure(full)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of one minus the cosine similarity of what is normalised before."""
    student_norm = functional.normalize(student, p=2, dim=-1)
    teacher_norm = functional.normalize(teacher, p=2, dim=-1)
    loss = 1.0 * (1 - functional.cosine_similarity(student_norm, teacher_norm, dim=-1))
    return loss.mean()


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of two heads' logits, the mixture made of probabilities."""
    log_student, log_teacher = (
        functional.log_softmax(student, dim=-1),
        functional.log_softmax(teacher, dim=-1),
    )
    mixture = 0.5 * log_student.exp() + 0.5 * log_teacher.exp()
    log_mixture = mixture.log()
    of_student, of_teacher = (
        functional.kl_div(log_mixture, each, reduction="batchmean", log_target=True)
        for each in (log_student, log_teacher)
    )
    return 0.5 * of_teacher + 0.5 * of_student


distill_cosine, distill_jsd = partial(distill, soft=cosine), partial(distill, soft=jensen_shannon)


class VocabParallel(torch.autograd.Function):
    """Megatron's cross entropy of a vocabulary on one rank: logits (S, B, V) and targets (S, B) to losses (S, B)."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, target: Tensor) -> Tensor:
        logits = given.float()
        largest = torch.max(logits, dim=-1)[0]
        logits -= largest.unsqueeze(dim=-1)
        outside = (target < 0) | (target >= logits.shape[-1])
        inside = target.clone() - 0
        inside[outside] = 0
        flat, inside = logits.view(-1, logits.shape[-1]), inside.view(-1)
        places = torch.arange(flat.shape[0], device=flat.device)
        chosen = flat[places, inside]
        chosen = chosen.clone().contiguous().view_as(target)
        chosen[outside] = 0.0
        torch.exp(logits, out=logits)
        sums = logits.sum(dim=-1)
        loss = torch.log(sums) - chosen
        logits.div_(sums.unsqueeze(dim=-1))
        ctx.save_for_backward(logits, outside, inside)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probabilities, outside, inside = ctx.saved_tensors
        flat = probabilities.view(-1, probabilities.shape[-1])
        places = torch.arange(flat.shape[0], device=flat.device)
        update = 1.0 - outside.view(-1).float()
        flat[places, inside] -= update
        probabilities.mul_(gradients[0].unsqueeze(dim=-1))
        return probabilities, None


def megatron_cross_entropy(row: Row, measure: Measure) -> int:
    """`VocabParallel` of logits in bfloat16, without a gradient from before."""
    length, batch, vocabulary = (row.size(name) for name in ("S", "B", "V"))
    logits = torch.randn(length, batch, vocabulary, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, vocabulary, (length, batch), device=CUDA)

    def full() -> None:
        logits.grad = None
        losses = VocabParallel.apply(logits, target)
        losses.sum().backward()

    return measure(full)
