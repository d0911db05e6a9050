"""A checkpoint's generation config, checked against the model that generates by it.

transformers' own `GenerationConfig` is made from it only where its processors are (`choosing.py`): it refuses, or takes
without a word, what here has a sentence.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from harness.config.load import Settings
from harness.config.strategy import Strategy, merged
from harness.generation.choosing import processors
from harness.model.generation_defaults import fields_of

INDEXING = ("sequence_bias", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")
"""The fields whose processors fail at a token that the model does not know."""


def strategy_of(settings: Settings, config: PretrainedConfig) -> Strategy:
    """How a model of `config` chooses tokens by `settings`. Raises Refusal, as `merged`, and for unknown tokens."""
    place = settings.model.path
    origin = ("model", settings.model.name) if place is None else ("model.path", place)
    strategy = merged(settings.generation, fields_of(settings.model, config), origin, settings.seed)
    _check(strategy, config)
    return strategy


def _check(strategy: Strategy, config: PretrainedConfig) -> None:
    """Refuse what holds and cannot, for a model of `config`."""
    fields, known = strategy.processed, config.get_text_config(decoder=True).vocab_size
    blank = GenerationConfig()
    for name, value in fields.items():
        if not hasattr(blank, name):
            raise strategy.refusal(name, "this transformers has no such field")
        unknown = [token for token in _tokens(value) if token >= known] if name in INDEXING else []
        if unknown:
            raise strategy.refusal(name, f"it has token {max(unknown)}, and the model knows {known}")
    if "exponential_decay_length_penalty" in fields and not strategy.ends:
        name, why = "exponential_decay_length_penalty", "it raises an end token, and there is none"
        raise strategy.refusal(name, why)
    try:
        processors(strategy, config, torch.zeros(1, 2, dtype=torch.int64), 2)
    except ValueError as error:
        told = next(iter(str(error).strip().splitlines()))
        raise strategy.refusal(next(iter(fields)), f"transformers refuses it: {told}") from error


def _tokens(value: Any) -> Iterator[int]:
    """Every whole number in `value`."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _tokens(each)
