"""The loss of a training run without the logits of a whole batch: the model's head computes it from hidden states.

The model's own forward calls its head and then its loss function. With `apply` the head returns the hidden states as
they are, and the loss function gives them back to the head, with the labels. So the head's weight is used in a call of
the head's module, where ZeRO-3 gathers it, and the ledger and a search for what is not finite name it.
`loss_check.py` detects a model for which this is another loss.

torch's `linear_cross_entropy` computes it: the only maintained implementation that keeps no logits for backward and
runs on every device. torchtune's and NeMo's keep each chunk's logits for autograd or need a compiler; liger-kernel and
cut-cross-entropy need a GPU. It is called without a reduction, because torch adds up a mean in the precision of the
hidden states: in bf16 that mean was 0.7% off, and the mean of single losses in fp32 0.002%. Its backward then computes
the logits again.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from harness.config.settings import Loss
from harness.data.batch import IGNORED
from harness.ledger.patch import DATA, TORCH, TRANSFORMERS, Patch, install, patched, table

_STAYS = "as long as the model lives"
_OPERATOR = "_linear_cross_entropy_batch_chunked_no_reduction"

PATCHES = table(
    Patch(
        "torch.nn.Linear",
        "forward",
        "the head of a model computes the loss, in place of logits",
        TORCH,
        stays=_STAYS,
    ),
    Patch(
        "transformers.modeling_utils.PreTrainedModel",
        "loss_function",
        "the head of a model computes the loss, in place of logits",
        TRANSFORMERS,
        unchecked=DATA,
        stays=_STAYS,
    ),
    Patch(
        "torch.nn.modules.linear_cross_entropy",
        _OPERATOR,
        "an operator that is registered from Python hides what it allocates and computes",
        TORCH,
        unchecked="a registered operator has no signature",
        optional=True,  # torch 2.13 has it
    ),
)

OfHead = Callable[[Tensor, Tensor, nn.Linear, float | None], Tensor]
"""From hidden states [B, T, H], labels [B, T] and the head to the mean loss per token; with a number of items, to their
sum by that number.
"""


def apply(model: PreTrainedModel, loss: Loss) -> None:
    """Let `model` compute its loss as `loss` says, while it is given labels. Without labels its logits are hidden
    states.
    """
    if loss.kind == "chunked":
        give_to_head(model, partial(chunked, chunk=loss.chunk))
    if loss.kind == "fused":
        give_to_head(model, fused)


def give_to_head(model: PreTrainedModel, of_head: OfHead) -> None:
    """Let the head of `model` compute the loss by `of_head`."""
    head = model.get_output_embeddings()

    def forward(input: Tensor, *others: Any) -> Tensor:
        if not others:
            return input
        labels, items = others
        return of_head(input, labels, head, items)

    def loss_function(
        logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: float | None = None, **_: Any
    ) -> Tensor:
        loss: Tensor = head(logits, labels, num_items_in_batch)
        return loss

    install(PATCHES["torch.nn.Linear.forward"].by(lambda _: forward, head))
    name = "transformers.modeling_utils.PreTrainedModel.loss_function"
    install(PATCHES[name].by(lambda _: loss_function, model))


def chunked(
    hidden: Tensor, labels: Tensor, head: nn.Linear, items: float | None = None, chunk: int | None = None
) -> Tensor:
    """The mean loss per token in fp32, as transformers' `ForCausalLMLoss` has it, from the logits of `chunk` tokens at
    a time.

    `hidden` is [B, T, H], `labels` [B, T] with -100 where there is no loss; where all are, the mean is NaN and its
    gradients are 0. With `items` it is the sum of the losses by that number.

    Without `chunk` torch chooses: logits of at most about the size of the hidden states.
    """
    targets = next_labels(labels)
    with patched(PATCHES[f"torch.nn.modules.linear_cross_entropy.{_OPERATOR}"].by(_seen_inside)):
        losses = functional.linear_cross_entropy(
            hidden.flatten(0, -2),
            head.weight,
            targets,
            linear_bias=head.bias,
            reduction="none",
            ignore_index=IGNORED,
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=chunk),
        )
    total = losses.float().sum()
    if items is not None:
        return total / items
    count = (targets != IGNORED).sum()
    return _or_nan(total / count.clamp(min=1), count)


def fused(hidden: Tensor, labels: Tensor, head: nn.Linear, items: float | None = None) -> Tensor:
    """`chunked` in liger-kernel's kernels, which choose the chunk themselves and make all gradients in forward."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    targets = next_labels(labels)
    inputs = hidden.flatten(0, -2), head.weight, targets, head.bias
    if items is not None:
        total: Tensor = liger_fused_linear_cross_entropy(*inputs, ignore_index=IGNORED, reduction="sum")
        return total.float() / items
    mean: Tensor = liger_fused_linear_cross_entropy(*inputs, ignore_index=IGNORED)
    return _or_nan(mean.float(), (targets != IGNORED).sum())


def _or_nan(mean: Tensor, count: Tensor) -> Tensor:
    """The `mean` of `count` losses; NaN, with gradients of 0, where there are none."""
    return torch.where(count > 0, mean, math.nan)


def next_labels(labels: Tensor) -> Tensor:
    """For each token in `labels` [B, T] the label of the next, [B * T]; the last of a sequence has none."""
    return functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].flatten()


@cache
def _seen_inside(operator: Any) -> Callable[..., Tensor]:
    """What torch registers as `operator`, as a function whose own operators are dispatched one by one."""

    class Chunks(torch.autograd.Function):
        forward = staticmethod(operator._init_fn)
        setup_context = staticmethod(operator._setup_context_fn)
        backward = staticmethod(operator._backward_fn)

    return Chunks.apply
