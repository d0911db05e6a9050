"""The proof that a model may be cut: its stages, one after another, give what the whole gives, bit for bit.

It is made on the CPU before a run starts, on a small model: the run's own config, layers and split, but narrow, in the
run's dtype and attention, padded and not, and with the run's cache. A model that changes what its layers are given in
its own `forward` (granite scales embeddings, GPT-2 adds positions) would do so in every stage; it is refused.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.config.settings import Refusal, Settings
from harness.model import init_weights
from harness.model.kv_cache import make
from harness.model.loader import model_config, quiet
from harness.model.narrow import NoneRuns, first_line, narrowest
from harness.model.partition import ranges, split_of
from harness.model.stage import Stage, Uncuttable

PROMPT, ALL = 6, 8
"""Tokens of a prompt, and with those that follow it."""


class Shown(NamedTuple):
    """What a model is shown in one forward; with `labels` it is asked for a loss."""

    tokens: Tensor  # [2, T]
    told: Mapping[str, Tensor]  # mask [2, past + T] and positions [2, T], or nothing


def prove(settings: Settings) -> None:
    """Raise Refusal where the model, cut into stages as `settings` ask, is not shown to be the whole one."""
    config = model_config(settings.model)
    split = split_of(settings, config)
    kept = settings.generation.cache if settings.mode == "infer" else "none"
    if kept == "offloaded":  # what it keeps is a dynamic one's, in another place, and here there is but one
        kept = "dynamic"
    shape = json.dumps(config.to_dict(), sort_keys=True)
    trains = settings.mode == "train"
    reason = difference(shape, settings.model.attention, settings.precision, kept, tuple(split), trains)
    if reason is not None:
        remedy = f"{config.model_type} cannot be cut into stages: {reason}; use pipeline.stages=1"
        raise Refusal("pipeline.stages", len(split), remedy)


@cache
@torch.no_grad()
def difference(
    shape: str, attention: str, precision: str, kept: str, split: tuple[int, ...], trains: bool = False
) -> str | None:
    """How the stages of a small model of `shape` (its config as JSON) differ from the whole; None: in nothing."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.random.fork_rng(devices=[]), quiet():
        try:
            whole, expected = narrowest(
                shape, dtype, attention, lambda model: [_whole(model, case, kept) for case in _cases(kept)]
            )
        except NoneRuns as error:
            return f"none of the small models of it runs, so nothing shows that it can ({error})"
        return _compared(whole, split, kept, expected, trains)


def _cases(kept: str) -> list[tuple[Shown, ...]]:
    """A batch at once, one that is padded on the left, and, with a cache, that one a token at a time."""
    tokens = torch.arange(2 * ALL).reshape(2, ALL) * 7 % 97 + 1
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    parts = [(0, PROMPT), *((end - 1, end) for end in range(PROMPT + 1, ALL + 1))]

    def padded(begin: int, end: int) -> Shown:
        return Shown(tokens[:, begin:end], {"mask": mask[:, :end], "positions": positions[:, begin:end]})

    at_once: list[tuple[Shown, ...]] = [(Shown(tokens, {}),), (padded(0, ALL),)]
    return at_once if kept == "none" else [*at_once, tuple(padded(*part) for part in parts)]


def _whole(model: PreTrainedModel, case: Sequence[Shown], kept: str) -> list[Tensor]:
    """The logits of each forward of `case`; where it is one alone, the loss too."""
    keep = make(kept if len(case) > 1 else "none", model.config, ALL)
    found = []
    for tokens, told in case:
        named = {"attention_mask": told.get("mask"), "position_ids": told.get("positions")}
        named = {name: value for name, value in named.items() if value is not None}
        labels = {"labels": tokens} if len(case) == 1 else {}
        out = model(input_ids=tokens, past_key_values=keep, use_cache=keep is not None, **named, **labels)
        found += [out.logits, *([out.loss] if labels else [])]
    return found


def _compared(
    whole: PreTrainedModel, layers: Sequence[int], kept: str, expected: Sequence[list[Tensor]], trains: bool
) -> str | None:
    """What differs between the stages, with the weights of `whole`, and what that gave."""
    found = {**dict(whole.named_parameters(remove_duplicate=False)), **dict(whole.named_buffers())}
    try:
        stages = [_stage(whole, span, found) for span in ranges(layers)]
        for case, wanted in zip(_cases(kept), expected, strict=True):
            reason = _chained(stages, case, kept, wanted)
            if reason is not None:
                return reason
        return _trained(stages) if trains else None
    except Uncuttable as error:
        return str(error)
    except Exception as error:  # a shape of model that nobody has seen
        return f"to cut it fails ({first_line(error)})"


def _stage(whole: PreTrainedModel, layers: range, found: Mapping[str, Tensor]) -> Stage:
    """A stage as a run makes it, with these weights."""
    outline = init_weights.outline(whole.config, whole.dtype, whole.config._attn_implementation)
    tree = list(init_weights.modules(outline))
    made = Stage(outline, layers)
    init_weights.make(outline, tree, made, torch.device("cpu"), seed=0)
    for name, tensor in made.stored().items():
        tensor.data.copy_(found[name])
    return made.eval()


def _chained(
    stages: Sequence[Stage], case: Sequence[Shown], kept: str, wanted: Sequence[Tensor]
) -> str | None:
    """What differs where the stages are shown `case` one after another."""
    keeps = [make(kept if len(case) > 1 else "none", stage.config, ALL) for stage in stages]
    left = list(wanted)
    for tokens, told in case:
        given = tokens
        for number, (stage, keep) in enumerate(zip(stages, keeps, strict=True)):
            seen: list[Tensor] = []
            hook = stage.layers[0].register_forward_pre_hook(_taking(seen), with_kwargs=True)
            try:
                out = stage(given, **told, cache=keep)
            except Exception as error:  # the model's own code, fed what it did not expect
                what = "hidden states" if number else "tokens"
                return f"stage {number} of it fails where it is given {what} ({first_line(error)})"
            hook.remove()
            if number and not (seen and torch.equal(seen[0], given)):
                return (
                    f"its own forward changes the hidden states before stage {number}'s first layer, where it should "
                    "only pass them on: it scales embeddings there, adds positions or the like"
                )
            given = out
        pairs = [("logits", given, left.pop(0))]
        if len(case) == 1:
            pairs.append(("loss", stages[-1].loss(given, tokens), left.pop(0)))
        for name, mine, whole in pairs:
            if not torch.equal(mine, whole):
                apart = float((mine.float() - whole.float()).abs().max())
                how = ", padded" if told else ""
                return f"the {name} of its stages differ from those of the whole by up to {apart:.2g}{how}"
    return None


def _trained(stages: Sequence[Stage]) -> str | None:
    """What stages in training do to hidden states outside of their layers, where chance hides it from a comparison."""
    given = _cases("none")[0][0].tokens
    for number, stage in enumerate(stages):
        seen: list[Tensor] = []
        made: list[Any] = []
        hooks = [
            stage.layers[0].register_forward_pre_hook(_taking(seen), with_kwargs=True),
            stage.layers[-1].register_forward_hook(lambda layer, args, out, made=made: made.append(out)),
        ]
        out = stage.train()(given)
        for hook in hooks:
            hook.remove()
        left = made[0] if isinstance(made[0], Tensor) else made[0][0]
        for where, same in (
            ("before", number == 0 or torch.equal(seen[0], given)),
            ("after", stage.last or torch.equal(left, out)),
        ):
            if not same:
                return (
                    f"in training its own forward changes the hidden states {where} stage {number}'s layers: it drops "
                    "some of them out there, or the like"
                )
        given = out
    return None


def _taking(seen: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    return hook
