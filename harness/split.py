"""How many layers each stage of a pipeline gets."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from transformers import PretrainedConfig

from harness.knobs import Settings


def split_of(settings: Settings, config: PretrainedConfig) -> list[int]:
    """The layers of each stage that `settings` ask for, once nothing needs to be measured for it."""
    asked, layers = settings.pipeline.split, config.get_text_config(decoder=True).num_hidden_layers
    if isinstance(asked, list):
        return asked
    assert asked == "uniform", asked
    return uniform(layers, settings.pipeline.stages)


def uniform(layers: int, stages: int) -> list[int]:
    """As even as can be; the first stage, which keeps the most micro-batches, is never among the larger ones alone."""
    each, more = divmod(layers, stages)
    return [each + (stage >= stages - more) for stage in range(stages)]


def ranges(split: Sequence[int]) -> list[range]:
    """The numbers of the layers of each stage."""
    return [range(begin, end) for begin, end in pairwise(accumulate(split, initial=0))]
