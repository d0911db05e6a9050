"""Check before a run that a model gives the same logits with a cache, in a batch and in a paged cache as it gives
alone.

The check runs on the CPU, on a small model: the run's own config and kinds of layers, but narrow, in fp32 and with the
run's attention. The config does not say whether an architecture passes the cache to its attention, uses the cache's
capacity as its length, or leaves out there what it does elsewhere (a soft cap, a bias by distance).
"""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from harness.config.errors import first_line
from harness.config.rules.generation import STATIC, has_prompts
from harness.config.settings import Generation, Refusal, Settings
from harness.data.prompts import Prompt
from harness.generation import continuous_batching, decode
from harness.generation.batch import Requests
from harness.generation.paged_cache import layers, limits_of
from harness.ledger import Ledger
from harness.model.kv_cache import check_kind
from harness.model.loader import quiet
from harness.model.narrow import NoneRuns, narrowest
from harness.model.plan import Plan

MIXED = [[5, 6, 7], [9, 40, 41, 42, 8, 7], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
EVEN = [prompt[:3] for prompt in MIXED]
"""`MIXED`: prompts of several lengths, which a batch pads. `EVEN`: prompts of one length."""

NEW = 6
"""New tokens after each prompt. Prompt and new tokens fill several pages of 4 tokens and exceed a
sliding window of 4.
"""

SHARP = {"attn_logit_softcapping": 0.1}
"""Config values that are made strong where a model has them, so that the check sees when attention leaves them out."""

TOLERANCE = 1e-4
"""Relative to the largest logit. fp32 sums in another order differ far less; a missing part of attention differs more.
"""

AHEAD = "its output for a token depends on later tokens"

AS = {"quantized": "dynamic", "offloaded": "dynamic"}
"""Kinds of cache that are checked as another kind: they differ from it only in bits or in place."""

Look = Callable[[str, bool], str | None]
"""`difference` for the run's own config and attention: from kind of cache and `mixed` to the reason, or None."""


def prove(plan: Plan) -> None:
    """Raise Refusal where the small model's logits under `plan` differ from its logits alone and without a cache.

    A stateless decoder that transformers builds for compilation is checked only with settings that are not the default.
    """
    settings, config = plan.settings, plan.config
    generation = settings.generation
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    compiles = bool(getattr(model, "_can_compile_fullgraph", False))
    trusted = compiles and not model._is_stateful and not config.is_encoder_decoder
    look: Look = partial(difference, json.dumps(config.to_dict(), sort_keys=True), settings.model.attention)
    if settings.mode == "train":
        if not trusted and look("none", False) == AHEAD:
            raise _not_causal(settings, config)
        return
    check_kind(generation.cache, config, generation.cache_bits, settings.tensor_parallel)
    if generation.compile and not compiles:
        remedy = f"transformers does not mark {config.model_type} as compilable; use generation.compile=false"
        raise Refusal("generation.compile", True, remedy)
    kind, mixed = AS.get(generation.cache, generation.cache), _mixed(generation)
    if kind == "paged":
        layers(config)
    elif trusted and kind != "static":
        return
    reason = look(kind, mixed)
    if reason == AHEAD:
        raise _not_causal(settings, config)
    if reason is not None:
        raise _refusal(generation, config.model_type, reason, look)


def _mixed(generation: Generation) -> bool:
    """Whether a batch may contain prompts of several lengths."""
    return generation.batch > 1 and (has_prompts(generation) or generation.lengths != "fixed")


def _refusal(generation: Generation, model: str, reason: str, look: Look) -> Refusal:
    """The Refusal for this `reason`, with settings that pass the check."""
    if generation.cache == "paged":
        remedy = f"{model} gives other results with a paged cache: {reason}; use {STATIC}"
        return Refusal("generation.batching", "continuous", remedy)
    kind, mixed = AS.get(generation.cache, generation.cache), _mixed(generation)
    kinds = [other for other in ("dynamic", "static", "none") if other != kind]
    others = [other for other in kinds if look(other, mixed) is None]
    if not others and mixed and look(kind, False) is None:
        remedy = f"{model} gives other results where a prompt is padded beside a longer one: {reason}; use 1"
        return Refusal("generation.batch", generation.batch, remedy)
    if not others and mixed:
        others = [f"{other} generation.batch=1" for other in kinds if look(other, False) is None]
    use = f"use generation.cache={others[0]}" if others else "no other cache is right either"
    return Refusal(
        "generation.cache", generation.cache, f"{model} gives other results with it: {reason}; {use}"
    )


def _not_causal(settings: Settings, config: PretrainedConfig) -> Refusal:
    model = settings.model
    key, value = ("model.path", model.path) if model.path else ("model.config.model_type", config.model_type)
    decodes = "; say is_decoder=true in its config" if getattr(config, "is_decoder", None) is False else ""
    return Refusal(key, value, f"{config.model_type} is not a causal language model: {AHEAD}{decodes}")


@cache
@torch.no_grad()
def difference(shape: str, attention: str, kind: str, mixed: bool = True) -> str | None:
    """How a small model of `shape` (its config as JSON) with this `kind` of cache differs from itself without one.

    With `mixed` its prompts have several lengths. None where nothing differs. Also None where no small model runs and
    the kind is `dynamic` (transformers' default) or `none`.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        reason = _small_difference(shape, attention, kind, mixed, cut=True)
        if reason not in (None, AHEAD):  # some architectures work only with their full number of layers
            reason = _small_difference(shape, attention, kind, mixed, cut=False)
    return reason


def _small_difference(shape: str, attention: str, kind: str, mixed: bool, cut: bool) -> str | None:
    """`difference` for one small model, with fewer layers where `cut` is set."""
    try:
        model, ahead = narrowest(shape, torch.float32, attention, _reads_ahead, cut=cut, **SHARP)
    except NoneRuns as error:
        unseen = f"no small model of its config runs, so this cannot be checked ({error})"
        return None if kind in ("dynamic", "none") else unseen
    if ahead:
        return AHEAD
    try:
        return _compared(model, kind, MIXED if mixed else EVEN)
    except Exception as error:  # the model's own code may raise any type
        return f"there it fails ({first_line(error, named=True)})"


def _reads_ahead(model: PreTrainedModel) -> bool:
    """Whether later tokens change the logits of earlier ones."""
    prompt = MIXED[-1]
    return (
        _distance(_alone_logits(model, prompt)[: NEW - 1], _alone_logits(model, prompt[: NEW - 1]))
        is not None
    )


def _compared(model: PreTrainedModel, kind: str, prompts: Sequence[list[int]]) -> str | None:
    """The difference found: first with all requests at once; with a paged cache also with prompts in chunks, where
    requests enter as others leave.
    """
    step_logits: list[Tensor] = []  # for each forward, the logits of every request
    paged = kind == "paged"
    hook = model.register_forward_hook(
        lambda module, args, out: step_logits.append(out.logits[0] if paged else out.logits[:, -1])
    )
    generation = Generation(batch=len(prompts), page_size=4)
    outputs = _paged(model, prompts, generation) if paged else _batched(model, prompts, kind)
    hook.remove()
    for number, (prompt, new) in enumerate(zip(prompts, outputs, strict=True)):
        alone = _alone_logits(model, [*prompt, *new[:-1]])[len(prompt) - 1 :]
        distance = _distance(torch.stack([logits[number] for logits in step_logits]), alone)
        if distance is not None:
            return f"logits differ by up to {distance:.2g} from those without"
    if paged and _paged(model, prompts, Generation(batch=2, batch_tokens=5, page_size=4)) != outputs:
        return "tokens differ where a prompt is processed in parts"
    return None


def _distance(logits: Tensor, expected: Tensor) -> float | None:
    """The largest absolute difference; None where it is within `TOLERANCE`."""
    distance = float((logits - expected).abs().max())
    return None if distance <= TOLERANCE * float(expected.abs().max()) else distance


def _batched(model: PreTrainedModel, prompts: Sequence[list[int]], kind: str) -> list[list[int]]:
    return decode.generate(model, _requests(prompts), cache=kind, ledger=_no_ledger()).tokens


def _paged(model: PreTrainedModel, prompts: Sequence[list[int]], generation: Generation) -> list[list[int]]:
    entries = [Prompt("", prompt, NEW, "", "", "") for prompt in prompts]
    limits = limits_of(generation, model.config, torch.float32, entries)
    return continuous_batching.generate(model, _requests(prompts), limits=limits, ledger=_no_ledger()).tokens


def _requests(prompts: Sequence[list[int]]) -> Requests:
    return Requests(prompts, [NEW for _ in prompts])


def _no_ledger() -> Ledger:
    return Ledger(mode="off", device="cpu")


def _alone_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """The logits after each of `tokens`, [T, V], from one forward of this sequence alone, without a cache."""
    input_ids, positions = torch.tensor([[*tokens]]), torch.arange(len(tokens))[None]
    out: Any = model(input_ids=input_ids, position_ids=positions, use_cache=False)
    logits: Tensor = out.logits[0]
    return logits
