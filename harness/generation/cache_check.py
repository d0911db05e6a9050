"""The proof that a model says the same however it is asked: from a cache, beside others in a batch, in pages.

It is made on the CPU before a run starts, on a small model: the run's own config and kinds of layers, but narrow, in
fp32 and with the run's attention. Whether an architecture hands a cache on to its attention, takes the room in it for
its length, or leaves out there what it does elsewhere (a soft cap, a bias by distance) cannot be read off its config.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from harness.config.rules.generation import STATIC, given
from harness.config.settings import Generation, Refusal, Settings
from harness.data.prompts import Prompt
from harness.generation import continuous_batching, decode
from harness.generation.batch import Requests
from harness.generation.paged_cache import layers, room
from harness.ledger import Ledger
from harness.model.kv_cache import check_kind
from harness.model.loader import model_config, quiet
from harness.model.narrow import NoneRuns, first_line, narrowest

MIXED = [[5, 6, 7], [9, 40, 41, 42, 8, 7], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
EVEN = [prompt[:3] for prompt in MIXED]
"""Prompts of several lengths, which are padded in a batch, and of one."""

NEW = 6
"""Tokens that follow each; with the prompts they fill pages of 4, and a window of as many."""

SHARP = {"attn_logit_softcapping": 0.1}
"""What a model has of these is made so strong that it shows where it is left out."""

TOLERANCE = 1e-4
"""Of the largest logit: fp32 sums in another order come to far less, what attention leaves out to more."""

AHEAD = "what it says of a token depends on those after it"

AS = {"quantized": "dynamic", "offloaded": "dynamic"}
"""Kinds of cache that are another one's with fewer bits, or in another place."""

Look = Callable[[str, bool], str | None]
"""`difference` of a run's own shape and attention."""


def prove(settings: Settings) -> None:
    """Raise Refusal where a model is not shown to say, asked as `settings` do, what it says alone and with no cache.

    Of a decoder that transformers makes to be compiled, and that keeps no state, only what is not the default is asked.
    """
    config, asked = model_config(settings.model), settings.generation
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    compiles = bool(getattr(model, "_can_compile_fullgraph", False))
    plain = compiles and not model._is_stateful and not config.is_encoder_decoder
    look: Look = partial(difference, json.dumps(config.to_dict(), sort_keys=True), settings.model.attention)
    if settings.mode == "train":
        if not plain and look("none", False) == AHEAD:
            raise _ahead(settings, config)
        return
    check_kind(asked.cache, config, asked.cache_bits, settings.tensor_parallel)
    if asked.compile and not compiles:
        remedy = f"transformers does not make {config.model_type} to be compiled whole; use generation.compile=false"
        raise Refusal("generation.compile", True, remedy)
    kind, mixed = AS.get(asked.cache, asked.cache), _mixed(asked)
    if kind == "paged":
        layers(config)
    elif plain and kind != "static":
        return
    reason = look(kind, mixed)
    if reason == AHEAD:
        raise _ahead(settings, config)
    if reason is not None:
        raise _refusal(asked, config.model_type, reason, look)


def _mixed(asked: Generation) -> bool:
    """Whether a batch may have prompts of several lengths."""
    return asked.batch > 1 and (given(asked) or asked.lengths != "fixed")


def _refusal(asked: Generation, model: str, reason: str, look: Look) -> Refusal:
    """What is wrong for this `reason`, and what would do."""
    if asked.cache == "paged":
        remedy = f"{model} is not the same in pages: {reason}; use {STATIC}"
        return Refusal("generation.batching", "continuous", remedy)
    kind, mixed = AS.get(asked.cache, asked.cache), _mixed(asked)
    kinds = [other for other in ("dynamic", "static", "none") if other != kind]
    others = [other for other in kinds if look(other, mixed) is None]
    if not others and mixed and look(kind, False) is None:
        remedy = f"{model} is not the same where a prompt is padded beside a longer one: {reason}; use 1"
        return Refusal("generation.batch", asked.batch, remedy)
    if not others and mixed:
        others = [f"{other} generation.batch=1" for other in kinds if look(other, False) is None]
    use = f"use generation.cache={others[0]}" if others else "no other cache is right either"
    return Refusal("generation.cache", asked.cache, f"{model} is not the same with it: {reason}; {use}")


def _ahead(settings: Settings, config: PretrainedConfig) -> Refusal:
    given = settings.model
    key, value = ("model.path", given.path) if given.path else ("model.config.model_type", config.model_type)
    decodes = "; say is_decoder=true in its config" if getattr(config, "is_decoder", None) is False else ""
    return Refusal(key, value, f"{config.model_type} is no causal language model: {AHEAD}{decodes}")


@cache
@torch.no_grad()
def difference(shape: str, attention: str, kind: str, mixed: bool = True) -> str | None:
    """How a small model of `shape` (its config as JSON) differs with a cache of this `kind` from itself without.

    With `mixed` its prompts have several lengths. None where it differs in nothing; nor, with transformers' own default
    and with none, where no such model runs.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        reason = _of_small(shape, attention, kind, mixed, cut=True)
        if reason not in (None, AHEAD):  # some have layers that are right in their own number alone
            reason = _of_small(shape, attention, kind, mixed, cut=False)
    return reason


def _of_small(shape: str, attention: str, kind: str, mixed: bool, cut: bool) -> str | None:
    """`difference`, of a model with fewer layers where it is `cut`."""
    try:
        model, ahead = narrowest(shape, torch.float32, attention, _reads_ahead, cut=cut, **SHARP)
    except NoneRuns as error:
        unseen = f"none of the small models of it runs, so nothing shows that it is ({error})"
        return None if kind in ("dynamic", "none") else unseen
    if ahead:
        return AHEAD
    try:
        return _compared(model, kind, MIXED if mixed else EVEN)
    except Exception as error:  # a model that is not made for it
        return f"there it fails ({first_line(error)})"


def _reads_ahead(model: PreTrainedModel) -> bool:
    """Whether what comes after a token changes what `model` says of it."""
    prompt = MIXED[-1]
    return _apart(_alone(model, prompt)[: NEW - 1], _alone(model, prompt[: NEW - 1])) is not None


def _compared(model: PreTrainedModel, kind: str, prompts: Sequence[list[int]]) -> str | None:
    """What differs: all requests at once, and in pages in parts too, entering as others leave."""
    seen: list[Tensor] = []  # by forward, the logits of each request
    paged = kind == "paged"
    hook = model.register_forward_hook(
        lambda module, args, out: seen.append(out.logits[0] if paged else out.logits[:, -1])
    )
    everyone = Generation(batch=len(prompts), page_size=4)
    together = _paged(model, prompts, everyone) if paged else _batched(model, prompts, kind)
    hook.remove()
    for number, (prompt, new) in enumerate(zip(prompts, together, strict=True)):
        alone = _alone(model, [*prompt, *new[:-1]])[len(prompt) - 1 :]
        apart = _apart(torch.stack([logits[number] for logits in seen]), alone)
        if apart is not None:
            return f"logits differ by up to {apart:.2g} from those without"
    if paged and _paged(model, prompts, Generation(batch=2, batch_tokens=5, page_size=4)) != together:
        return "tokens differ where a prompt is shown in parts"
    return None


def _apart(logits: Tensor, expected: Tensor) -> float | None:
    """How far they are from each other; None where sums in another order come to that."""
    apart = float((logits - expected).abs().max())
    return None if apart <= TOLERANCE * float(expected.abs().max()) else apart


def _batched(model: PreTrainedModel, prompts: Sequence[list[int]], kind: str) -> list[list[int]]:
    return decode.generate(model, _requests(prompts), cache=kind, ledger=_unwatched()).tokens


def _paged(model: PreTrainedModel, prompts: Sequence[list[int]], asked: Generation) -> list[list[int]]:
    given = [Prompt("", prompt, NEW, "", "", "") for prompt in prompts]
    within = room(asked, model.config, torch.float32, given)
    return continuous_batching.generate(model, _requests(prompts), room=within, ledger=_unwatched()).tokens


def _requests(prompts: Sequence[list[int]]) -> Requests:
    return Requests(prompts, [NEW for _ in prompts])


def _unwatched() -> Ledger:
    return Ledger(mode="off", device="cpu")


def _alone(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """The logits after each of `tokens`, which the model is shown at once, and no others: [T, V]."""
    shown, positions = torch.tensor([[*tokens]]), torch.arange(len(tokens))[None]
    out: Any = model(input_ids=shown, position_ids=positions, use_cache=False)
    logits: Tensor = out.logits[0]
    return logits
