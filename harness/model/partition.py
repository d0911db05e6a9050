"""How many layers each stage of a pipeline gets."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import PretrainedConfig

from harness.config.rules import check_split
from harness.config.settings import Settings
from harness.model import init_weights
from harness.model.stage import parts

Cost = Callable[[int, int, int], float]
"""What a stage with the layers from one number to another would hold."""


def split_of(settings: Settings, config: PretrainedConfig) -> list[int]:
    """The layers of each stage that `settings` ask for; `rehearsal.balance` has made a list of `memory` before.

    Raises Refusal where the model has fewer layers than there are stages, or others than the list says.
    """
    asked, stages = settings.pipeline.split, settings.pipeline.stages
    layers = config.get_text_config(decoder=True).num_hidden_layers
    check_split(settings.pipeline, layers)
    if isinstance(asked, list):
        return asked
    if asked == "parameters":
        return by_parameters(config, stages)
    assert asked == "uniform", asked
    return uniform(layers, stages)


def uniform(layers: int, stages: int) -> list[int]:
    """As even as can be; the first stage, which keeps the most micro-batches, is never among the larger ones alone."""
    each, more = divmod(layers, stages)
    return [each + (stage >= stages - more) for stage in range(stages)]


def by_parameters(config: PretrainedConfig, stages: int) -> list[int]:
    """So that the stage with the most parameters has as few as can be, embedding and head counted."""
    whole = init_weights.outline(config, torch.bfloat16)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    found = parts(whole, [1] * layers)  # a layer a stage: the first has the embedding too, the last the head
    upto = [0, *accumulate(sum(parameter.numel() for parameter in part.values()) for part in found)]
    return balanced(layers, stages, lambda stage, begin, end: upto[end] - upto[begin])


def balanced(layers: int, stages: int, cost: Cost) -> list[int]:
    """The split whose most costly stage costs least; of those the one that costs the others least, squared."""

    @cache
    def best(stage: int, begin: int) -> tuple[float, float, tuple[int, ...]]:
        """The highest cost from `stage` on, the squares of all, and the layers of each."""
        found = []
        last = stage == stages - 1
        for end in range(layers if last else begin + 1, layers - (stages - 1 - stage) + 1):
            mine = float(cost(stage, begin, end))
            highest, squares, rest = (0.0, 0.0, ()) if last else best(stage + 1, end)
            found.append((max(mine, highest), mine * mine + squares, (end - begin, *rest)))
        return min(found)

    return list(best(0, 0)[2])


def ranges(split: Sequence[int]) -> list[range]:
    """The numbers of the layers of each stage."""
    return [range(begin, end) for begin, end in pairwise(accumulate(split, initial=0))]


def as_record(settings: Settings, split: Sequence[int]) -> dict[str, Any]:
    """The record's `pipeline`. `bubble` is the part of a step in which a stage waits for the others, under 1F1B."""
    stages, micro_batches = len(split), settings.train.accumulation
    made: dict[str, Any] = {"stages": stages, "split": list(split)}
    if settings.mode == "train":
        made |= {
            "micro_batches": micro_batches,
            "bubble": (stages - 1) / (micro_batches + stages - 1),
        }
    return made
