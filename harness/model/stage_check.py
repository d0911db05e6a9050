"""Check that a model can be cut: its stages, run one after another, give bit for bit what the whole model gives.

The check runs on the CPU before a run, on a small model: the run's own config, layers and split, but narrow, with the
run's dtype, attention and cache, with and without padding. A model whose own `forward` changes the input of its layers
(granite scales embeddings, GPT-2 adds positions) would do so in every stage; it is refused.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.config.errors import first_line
from harness.config.settings import Refusal
from harness.model import init_weights
from harness.model.kv_cache import make
from harness.model.loader import quiet
from harness.model.narrow import NoneRuns, narrowest
from harness.model.partition import ranges
from harness.model.plan import Plan
from harness.model.stage import Stage, Uncuttable

PROMPT, ALL = 6, 8
"""Tokens of the prompt, and of the prompt and the new tokens together."""


class Inputs(NamedTuple):
    """The inputs of one forward. A case of one forward also compares the loss."""

    tokens: Tensor  # [2, T]
    masks: Mapping[str, Tensor]  # mask [2, past + T] and positions [2, T], or empty


def prove(plan: Plan) -> None:
    """Raise Refusal where the pipeline stages of `plan` do not give what the whole model gives."""
    settings, config, split = plan.settings, plan.config, plan.split
    cache = settings.generation.cache if settings.mode == "infer" else "none"
    if cache == "offloaded":  # the same values as a dynamic cache, only in another memory
        cache = "dynamic"
    shape = json.dumps(config.to_dict(), sort_keys=True)
    trains = settings.mode == "train"
    reason = difference(shape, settings.model.attention, settings.dtype, cache, tuple(split), trains)
    if reason is not None:
        remedy = f"{config.model_type} cannot be cut into stages: {reason}; use pipeline.stages=1"
        raise Refusal("pipeline.stages", len(split), remedy)


@cache
@torch.no_grad()
def difference(
    shape: str, attention: str, dtype_name: str, kept: str, split: tuple[int, ...], trains: bool = False
) -> str | None:
    """How the stages of a small model of `shape` (its config as JSON) differ from the whole; None if they are equal."""
    dtype = getattr(torch, dtype_name)
    with torch.random.fork_rng(devices=[]), quiet():
        try:
            whole, expected = narrowest(
                shape, dtype, attention, lambda model: [_whole(model, case, kept) for case in _cases(kept)]
            )
        except NoneRuns as error:
            return f"no small model of its config runs, so this cannot be checked ({error})"
        return _compared(whole, split, kept, expected, trains)


def _cases(kind: str) -> list[tuple[Inputs, ...]]:
    """A batch in one forward; a left-padded batch in one forward; and with a cache the padded batch token by token."""
    tokens = torch.arange(2 * ALL).reshape(2, ALL) * 7 % 97 + 1
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    parts = [(0, PROMPT), *((end - 1, end) for end in range(PROMPT + 1, ALL + 1))]

    def padded(begin: int, end: int) -> Inputs:
        return Inputs(tokens[:, begin:end], {"mask": mask[:, :end], "positions": positions[:, begin:end]})

    at_once: list[tuple[Inputs, ...]] = [(Inputs(tokens, {}),), (padded(0, ALL),)]
    return at_once if kind == "none" else [*at_once, tuple(padded(*part) for part in parts)]


def _whole(model: PreTrainedModel, case: Sequence[Inputs], kind: str) -> list[Tensor]:
    """The logits of each forward of `case`; for a single forward also the loss."""
    kv_cache = make(kind if len(case) > 1 else "none", model.config, ALL)
    outputs = []
    for tokens, masks in case:
        options = {"attention_mask": masks.get("mask"), "position_ids": masks.get("positions")}
        options = {name: value for name, value in options.items() if value is not None}
        labels = {"labels": tokens} if len(case) == 1 else {}
        out = model(
            input_ids=tokens, past_key_values=kv_cache, use_cache=kv_cache is not None, **options, **labels
        )
        outputs += [out.logits, *([out.loss] if labels else [])]
    return outputs


def _compared(
    whole: PreTrainedModel, split: Sequence[int], kind: str, expected: Sequence[list[Tensor]], trains: bool
) -> str | None:
    """The difference between the stages, with the weights of `whole`, and the outputs of `whole`; None if equal."""
    weights = {**dict(whole.named_parameters(remove_duplicate=False)), **dict(whole.named_buffers())}
    try:
        stages = [_stage(whole, span, weights) for span in ranges(split)]
        for case, outputs in zip(_cases(kind), expected, strict=True):
            reason = _chained(stages, case, kind, outputs)
            if reason is not None:
                return reason
        return _trained(stages) if trains else None
    except Uncuttable as error:
        return str(error)
    except Exception as error:  # an unknown architecture may raise any type
        return f"cutting it fails ({first_line(error, named=True)})"


def _stage(whole: PreTrainedModel, layers: range, weights: Mapping[str, Tensor]) -> Stage:
    """A stage built as in a run, with these weights."""
    outline = init_weights.outline(whole.config, whole.dtype, whole.config._attn_implementation)
    tree = list(init_weights.modules(outline))
    stage = Stage(outline, layers)
    init_weights.make(outline, tree, stage, torch.device("cpu"), seed=0)
    for name, tensor in stage.stored().items():
        tensor.data.copy_(weights[name])
    return stage.eval()


def _chained(
    stages: Sequence[Stage], case: Sequence[Inputs], kind: str, outputs: Sequence[Tensor]
) -> str | None:
    """The first difference when the stages run `case` one after another; None if there is none."""
    caches = [make(kind if len(case) > 1 else "none", stage.config, ALL) for stage in stages]
    remaining = list(outputs)
    for tokens, masks in case:
        inputs = tokens
        for number, (stage, kv_cache) in enumerate(zip(stages, caches, strict=True)):
            captured: list[Tensor] = []
            hook = stage.layers[0].register_forward_pre_hook(_capture_input(captured), with_kwargs=True)
            try:
                out = stage(inputs, **masks, cache=kv_cache)
            except Exception as error:  # the model's own code may raise any type on unexpected inputs
                input_kind = "hidden states" if number else "tokens"
                return f"stage {number} of it fails where it is given {input_kind} ({first_line(error, named=True)})"
            hook.remove()
            if number and not (captured and torch.equal(captured[0], inputs)):
                return (
                    f"its own forward changes the hidden states before stage {number}'s first layer, where it should "
                    "only pass them on: it scales embeddings there, adds positions or the like"
                )
            inputs = out
        pairs = [("logits", inputs, remaining.pop(0))]
        if len(case) == 1:
            pairs.append(("loss", stages[-1].loss(inputs, tokens), remaining.pop(0)))
        for name, actual, whole in pairs:
            if not torch.equal(actual, whole):
                distance = float((actual.float() - whole.float()).abs().max())
                suffix = ", padded" if masks else ""
                return (
                    f"the {name} of its stages differ from those of the whole by up to {distance:.2g}{suffix}"
                )
    return None


def _trained(stages: Sequence[Stage]) -> str | None:
    """What stages in training mode do to hidden states outside of their layers. Random dropout makes outputs
    incomparable, so inputs and outputs of the layers are compared.
    """
    inputs = _cases("none")[0][0].tokens
    for number, stage in enumerate(stages):
        captured: list[Tensor] = []
        layer_outputs: list[Any] = []
        hooks = [
            stage.layers[0].register_forward_pre_hook(_capture_input(captured), with_kwargs=True),
            stage.layers[-1].register_forward_hook(
                lambda layer, args, out, layer_outputs=layer_outputs: layer_outputs.append(out)
            ),
        ]
        out = stage.train()(inputs)
        for hook in hooks:
            hook.remove()
        last_output = layer_outputs[0] if isinstance(layer_outputs[0], Tensor) else layer_outputs[0][0]
        for place, equal in (
            ("before", number == 0 or torch.equal(captured[0], inputs)),
            ("after", stage.last or torch.equal(last_output, out)),
        ):
            if not equal:
                return (
                    f"in training its own forward changes the hidden states {place} stage {number}'s layers: it drops "
                    "some of them out there, or the like"
                )
        inputs = out
    return None


def _capture_input(captured: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        captured.append(args[0] if args else kwargs["hidden_states"])

    return hook
