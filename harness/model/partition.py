"""The number of layers in each stage of a pipeline."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise

import torch
from transformers import PretrainedConfig

from harness.config.rules import check_split
from harness.config.settings import Settings
from harness.model import init_weights
from harness.model.stage import parts
from harness.record.results import Pipeline

Cost = Callable[[int, int, int], float]
"""The cost of a stage: from its number, its first layer and its end layer (exclusive) to bytes or parameters."""


def split_of(settings: Settings, config: PretrainedConfig) -> list[int]:
    """The layers of each stage under `settings`. `rehearsal.balance` has already replaced `memory` by a list.

    Raises Refusal where the model has fewer layers than stages, or another number of layers than the list.
    """
    split, stages = settings.pipeline.split, settings.pipeline.stages
    layers = config.get_text_config(decoder=True).num_hidden_layers
    check_split(settings.pipeline, layers)
    if isinstance(split, list):
        return split
    if split == "parameters":
        return by_parameters(config, stages)
    assert split == "uniform", split
    return uniform(layers, stages)


def uniform(layers: int, stages: int) -> list[int]:
    """As even as possible. Extra layers go to the last stages: the first stage keeps the most
    micro-batches in memory.
    """
    base, extra = divmod(layers, stages)
    return [base + (stage >= stages - extra) for stage in range(stages)]


def by_parameters(config: PretrainedConfig, stages: int) -> list[int]:
    """The split whose largest stage has the fewest parameters, with embedding and head counted."""
    whole = init_weights.outline(config, torch.bfloat16)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    # one layer per stage; the first also has the embedding, the last the head
    layer_parts = parts(whole, [1] * layers)
    cumulative = [
        0,
        *accumulate(sum(p.numel() for p in part.values()) for part in layer_parts),
    ]
    return balanced(layers, stages, lambda stage, begin, end: cumulative[end] - cumulative[begin])


def balanced(layers: int, stages: int, cost: Cost) -> list[int]:
    """The split with the lowest maximum cost of a stage; among those, the one with the lowest sum of squared costs."""

    @cache
    def best(stage: int, begin: int) -> tuple[float, float, tuple[int, ...]]:
        """For the stages from `stage` on: the highest cost, the sum of squares, and the layers of each stage."""
        candidates = []
        last = stage == stages - 1
        for end in range(layers if last else begin + 1, layers - (stages - 1 - stage) + 1):
            own_cost = float(cost(stage, begin, end))
            highest, squares, rest = (0.0, 0.0, ()) if last else best(stage + 1, end)
            candidates.append((max(own_cost, highest), own_cost * own_cost + squares, (end - begin, *rest)))
        return min(candidates)

    return list(best(0, 0)[2])


def ranges(split: Sequence[int]) -> list[range]:
    """The layer numbers of each stage."""
    return [range(begin, end) for begin, end in pairwise(accumulate(split, initial=0))]


def as_record(settings: Settings, split: Sequence[int]) -> Pipeline:
    """The record's `pipeline`. `bubble` is the fraction of a step in which a stage waits for others, with a 1F1B
    schedule.
    """
    stages, micro_batches = len(split), settings.train.accumulation
    if settings.mode != "train":
        return Pipeline(stages=stages, split=list(split))
    bubble = (stages - 1) / (micro_batches + stages - 1)
    return Pipeline(stages=stages, split=list(split), micro_batches=micro_batches, bubble=bubble)
