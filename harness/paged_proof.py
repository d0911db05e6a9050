"""The proof that a model may be batched continuously: in pages, among others, each request gets what it gets alone.

It is made on the CPU before a run starts, on a small model: the run's own config and layers, but narrow, in fp32 and
with the run's attention. Whether an architecture hands the cache on to its attention, and does nothing there that a
paged one leaves out (a soft cap, a bias by distance), cannot be read off its config.
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from harness import weights
from harness.continuous import generate
from harness.knobs import Generation, Refusal, Settings
from harness.ledger import Ledger
from harness.model import count, model_config, quiet
from harness.paging import layers, room
from harness.prompts import Prompt
from harness.proof import LARGEST, NARROW, first_line, made_narrow, small

PROMPTS = [[5, 6, 7], [9, 40, 41, 42, 8, 7], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
NEW = 6
"""Tokens that follow each; with the prompts they fill pages of 4, and a window of as many."""

SHARP = {"attn_logit_softcapping": 0.1}
"""What a model has of these is made so strong that it shows where it is left out."""

TOLERANCE = 1e-4
"""Of the largest logit: fp32 sums in another order come to far less, what attention leaves out to more."""


def prove(settings: Settings) -> None:
    """Raise Refusal where `settings` ask for continuous batching and the model is not shown to be the same in it."""
    if settings.mode == "train" or settings.generation.batching == "static":
        return
    config = model_config(settings.model)
    layers(config)
    reason = difference(json.dumps(config.to_dict(), sort_keys=True), settings.model.attention)
    if reason is not None:
        remedy = f"{config.model_type} is not the same in pages: {reason}; use generation.batching=static"
        raise Refusal("generation.batching", "continuous", remedy)


@cache
@torch.no_grad()
def difference(shape: str, attention: str) -> str | None:
    """How a small model of `shape` (its config as JSON) differs in pages from itself without; None: in nothing."""
    given = json.loads(shape)
    kind, failed = given.pop("model_type"), "each is too large"
    with torch.random.fork_rng(devices=[]), quiet():
        for widths in NARROW:
            try:
                config = small(AutoConfig.for_model(kind, **given), {**widths, **SHARP})
                if count(weights.outline(config, torch.float32)) > LARGEST:
                    continue
                model = made_narrow(config, torch.float32, attention)
                _alone(model, PROMPTS[0])
            except Exception as error:  # an architecture that cannot be so narrow fails in a way of its own
                failed = first_line(error)
                continue
            try:
                return _compared(model)
            except Exception as error:  # a model whose attention is not made for it
                return f"there it fails ({first_line(error)})"
    return f"none of the small models of it runs, so nothing shows that it is ({failed})"


def _compared(model: PreTrainedModel) -> str | None:
    """What differs: all requests at once, and in parts, entering as others leave."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, out: seen.append(out.logits[0]))
    together = _paged(model, Generation(batch=len(PROMPTS), page_size=4))
    hook.remove()
    for number, (prompt, new) in enumerate(zip(PROMPTS, together, strict=True)):
        alone = _alone(model, [*prompt, *new[:-1]])[len(prompt) - 1 :]
        among = torch.stack([logits[number] for logits in seen])
        apart = float((among - alone).abs().max())
        if not apart <= TOLERANCE * float(alone.abs().max()):
            return f"logits differ by up to {apart:.2g} from those without"
    if _paged(model, Generation(batch=2, batch_tokens=5, page_size=4)) != together:
        return "tokens differ where a prompt is shown in parts"
    return None


def _paged(model: PreTrainedModel, asked: Generation) -> list[list[int]]:
    most = [NEW for _ in PROMPTS]
    given = [Prompt("", prompt, NEW, "", "", "") for prompt in PROMPTS]
    within = room(asked, model.config, torch.float32, given)
    return generate(model, PROMPTS, most, room=within, ledger=Ledger(mode="off", device="cpu")).tokens


def _alone(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """The logits after each of `tokens`, which the model is shown at once, and no others: [T, V]."""
    out: Any = model(input_ids=torch.tensor([[*tokens]]), use_cache=False)
    logits: Tensor = out.logits[0]
    return logits
