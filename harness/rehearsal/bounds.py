"""What a config takes, before it is rehearsed: a lower bound by shapes alone, and an estimate from a few layers.

This module imports no torch, so its callers need not load it. `count` and `by_few_layers` do, and run in the workers of
`pool.py`.
"""

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from harness.config.errors import ours
from harness.config.settings import Settings
from harness.rehearsal.moments import Moment, agree, at_depth, moments_of
from harness.runtime import tracebacks
from harness.runtime.progress import aside

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ELEMENT = {"bfloat16": 2, "float32": 4}
"""Bytes of a parameter's element."""

MOMENTS = {"adamw": 8, "adamw_8bit": 2, "lion": 4, "muon": 2, "sgd": 0, "adafactor": 0}
"""Bytes that an optimizer's moments have at least for a parameter: AdamW's two means in fp32 (arXiv 1910.02054, 3.1) or
in 8 bits; one of Lion; one of Muon in the gradient's precision; of SGD none where it has no momentum.
"""

MASTER = {"bfloat16": 4, "float32": 0}
"""Bytes of a parameter's fp32 master weight."""

WORTH = {3: 2, 2: 3}
"""By how many models of a few layers are rehearsed: where the whole has at least so many times more layers than these
together.
"""


class Counted(NamedTuple):
    """The elements of a model's parameters, those that are trained, and the bytes of all others that
    `adapter=qlora` packs.
    """

    parameters: int
    trained: int
    packed: int | None = None


def model_of(settings: Settings) -> str:
    """What `count` depends on, as a key."""
    return repr((settings.model, settings.adapter, settings.dtype))


def count(settings: Settings) -> Counted | None:
    """The parameters of a model, whose `precision` must be resolved. None: its checkpoint is packed, or there is no
    such model.
    """
    import torch

    from harness.model import adapter, init_weights, storages
    from harness.model.loader import model_config
    from harness.quantization.method import of_adapter

    try:
        config = model_config(settings.model)
        if getattr(config, "quantization_config", None) is not None:
            return None
        parameters = [*adapter.outline(settings, config, torch.bfloat16).parameters()]
        trained = sum(each.numel() for each in parameters if each.requires_grad)
        packed = None
        if (quantization := of_adapter(settings)) is not None:
            whole = init_weights.outline(model_config(settings.model), getattr(torch, settings.dtype))
            quantization.pack(whole, settings.model)
            packed = storages.nbytes(whole)
        return Counted(sum(each.numel() for each in parameters), trained, packed)
    except Exception as error:  # the rehearsal words it
        _say_mistake(error)
        return None


def by_shapes(settings: Settings, counted: Counted | None) -> dict[str, int]:
    """Bytes by category that the rank with the highest peak surely has: its parameters and its optimizer state.

    N parameters on s stages, each with d data-parallel ranks: some stage has N / s or more. ZeRO-1 and
    above keeps 1/d of the optimizer's state, ZeRO-3 of the parameters too (Rajbhandari et al. 2020, arXiv 1910.02054,
    section 5). What is offloaded is not counted. Empty where nothing is sure: packed weights, options of DeepSpeed's
    that may change the state. `precision` must be resolved.
    """
    if counted is None or settings.deepspeed.options:
        return {}
    layout, dtype = settings.layout(settings.world.size or 1), settings.dtype
    parameters, trained, packed = counted
    of_rank = parameters // (layout.stages * layout.tp_size)
    if settings.mode == "infer":
        return {"parameters": of_rank * ELEMENT[dtype]}
    zero = settings.zero
    bound = {}
    if zero.offload != "all":
        bound["parameters"] = of_rank * ELEMENT[dtype] // (layout.dp_size if zero.stage == 3 else 1)
        if packed is not None:  # no rank has a part of it
            bound["parameters"] = packed + trained * ELEMENT[dtype]
    if zero.offload == "none" and (layout.stages == 1 or trained == parameters):
        state = MASTER[dtype] + MOMENTS[settings.optimizer.kind]
        state //= 2 if settings.optimizer.state == "bf16" else 1
        bound["optimizer"] = trained // layout.stages * state // (layout.dp_size if zero.stage else 1)
    return bound


def by_few_layers(settings: Settings) -> tuple[Moment, ...]:
    """The moments of a rank, estimated by rehearsing models of a few layers; empty where that cannot be done.

    The smallest has each kind of layer once, the next twice, and where they do not agree another three times.
    """
    from harness.model.plan import Plan
    from harness.rehearsal.one_rank import rehearse
    from harness.rehearsal.representatives import representatives_of

    try:
        whole = Plan.of(settings)
        few = _period(whole.config)
        depths = _depths(few, whole.number_of_layers)
        if settings.pipeline.stages > 1 or not depths:
            return ()
        of_depth: dict[int, tuple[Moment, ...]] = {}
        for depth in depths:
            if len(of_depth) > 1 and agree(of_depth, whole.number_of_layers):
                break
            plan = replace(whole, original_config=_cut(whole.config, depth))
            rank = max(representatives_of(plan), key=lambda each: each.size).rank
            of_depth[depth] = moments_of(rehearse(plan, rank)[0])
        return at_depth(of_depth, whole.number_of_layers)
    except Exception as error:  # an estimate that cannot be had is none; the rehearsal words what is wrong
        _say_mistake(error)
        return ()


def _depths(few: int, layers: int) -> list[int]:
    """The depths of the models to rehearse for one with so many `layers`; none where that is not worth it."""
    for number, times in WORTH.items():
        depths = [few * periods for periods in range(1, number + 1)]
        if times * sum(depths) <= layers:
            return depths
    return []


def _say_mistake(error: Exception) -> None:
    """Say it where no estimate can be had by a mistake of ours, which would else only make the search longer."""
    if ours(error):
        _say(tracebacks.sentence(error))


@cache
def _say(sentence: str) -> None:
    aside(f"no estimate, so more is rehearsed: {sentence}")


def _period(config: "PretrainedConfig") -> int:
    """After how many layers their kinds begin again."""
    from harness.model.narrow import kinds_of_layers

    kinds = kinds_of_layers(config.get_text_config(decoder=True))
    return next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), 1)


def _cut(config: "PretrainedConfig", layers: int) -> "PretrainedConfig":
    """`config`, which is changed, with only the first `layers`."""
    from harness.model.narrow import keep_layers

    keep_layers(config.get_text_config(decoder=True), layers)
    return config
