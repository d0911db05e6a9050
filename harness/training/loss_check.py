"""Check that a model's loss is the cross entropy of a linear head's output, and of nothing else.

The check runs on the CPU before a run, on a small model of the run's config. The model's own forward shows what it does
to the output of its head: Gemma 2 caps it, Granite and Cohere scale it. Such a model is refused.
"""

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from harness.config.errors import first_line
from harness.config.rules.loss import check_device
from harness.config.settings import Refusal
from harness.data.batch import IGNORED
from harness.ledger.patch import patched
from harness.model.loader import quiet
from harness.model.narrow import NoneRuns, narrowest
from harness.model.plan import Plan
from harness.training.head_loss import PATCHES, give_to_head, next_labels

CLOSE = 1e-5
"""The relative difference that the order of additions in fp32 may make."""


def prove(plan: Plan, device: str) -> None:
    """Raise Refusal where the loss that `plan` wants is not the model's own, or not one of `device`."""
    settings, config = plan.settings, plan.config
    loss = settings.loss
    check_device(settings, device)
    if loss.kind == "full" or settings.mode != "train":
        return
    text = config.get_text_config(decoder=True)
    if loss.kind == "chunked" and loss.chunk is None and text.vocab_size <= text.hidden_size:
        remedy = (
            f"with a vocabulary of {text.vocab_size} and hidden states of {text.hidden_size} torch takes all tokens at "
            "once; give loss.chunk=, or use loss=full"
        )
        raise Refusal("loss", loss.kind, remedy)
    shape = json.dumps(config.to_dict(), sort_keys=True)
    reason = difference(shape, settings.model.attention)
    if reason is not None:
        raise Refusal("loss", loss.kind, f"{config.model_type} {reason}; use loss=full")


@cache
@torch.no_grad()
def difference(shape: str, attention: str) -> str | None:
    """How the loss of a small model of `shape` (its config as JSON) differs from the cross entropy of its head's
    product; None if it is equal.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        try:
            model, (expected, reason) = narrowest(shape, torch.float32, attention, own)
        except NoneRuns as error:
            return f"cannot be checked: no small model of its config runs ({error})"
        return reason or _other(model, expected)


def _inputs() -> dict[str, Any]:
    tokens = torch.arange(16).reshape(2, 8) * 7 % 97 + 1
    return {"input_ids": tokens, "labels": tokens.masked_fill(tokens % 5 == 0, IGNORED), "use_cache": False}


def own(model: PreTrainedModel) -> tuple[Tensor, str | None]:
    """The model's own loss, and what its forward does with its head that is not linear alone."""
    head, outputs, given = model.get_output_embeddings(), list[Tensor](), list[Tensor]()

    def watched(loss_function: Any) -> Any:
        def watch(logits: Tensor, *others: Any, **options: Any) -> Any:
            given.append(logits)
            return loss_function(logits, *others, **options)

        return watch

    name = "transformers.modeling_utils.PreTrainedModel.loss_function"
    hook = head.register_forward_hook(lambda *call: outputs.append(call[-1])) if head is not None else None
    with patched(PATCHES[name].by(watched, model)):
        loss = model(**_inputs()).loss
    if hook is not None:
        hook.remove()
    return loss, _reason(head, outputs, given)


def _reason(head: nn.Module | None, outputs: list[Tensor], given: list[Tensor]) -> str | None:
    if type(head) is not nn.Linear:
        kind = "no one module" if head is None else f"a {type(head).__name__}"
        return f"has {kind} for a head, not a linear layer"
    if len(outputs) != 1 or len(given) != 1:
        return "does not compute its loss once from its head's output"
    if not torch.equal(outputs[0].float(), given[0].float()):
        return "changes its logits after its head: it caps or scales them, or the like"
    return None


def _other(model: PreTrainedModel, expected: Tensor) -> str | None:
    """The difference of the loss that the head computes from `expected`, if there is one. It changes `model`."""
    give_to_head(model, _cross_entropy)
    try:
        actual = model(**_inputs()).loss
    except (
        Exception
    ) as error:  # a model's own code may raise any type on the hidden states that it takes for logits
        return f"needs its logits for more than its loss ({first_line(error, named=True)})"
    if torch.allclose(actual, expected, rtol=CLOSE, atol=0):
        return None
    return (
        f"has another loss than the mean cross entropy of its next tokens: {expected:.6g}, not {actual:.6g}"
    )


def _cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Linear, items: float | None = None) -> Tensor:
    assert items is None
    logits = functional.linear(hidden, head.weight, head.bias).flatten(0, -2)
    return functional.cross_entropy(logits, next_labels(labels), ignore_index=IGNORED)
