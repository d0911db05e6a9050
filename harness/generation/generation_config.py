"""Check a checkpoint's generation config against the model that uses it.

transformers' own `GenerationConfig` is built only where its logits processors are (`choosing.py`): it raises on some
values, or silently accepts values, for which this code has a clear error message.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from harness.config.errors import first_line
from harness.config.load import Settings
from harness.config.strategy import Strategy, merged
from harness.generation.choosing import processors
from harness.model.generation_defaults import fields_of
from harness.record.results import Setting

INDEXING = ("sequence_bias", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")
"""Fields whose processors fail on a token id outside of the vocabulary."""


def strategy_of(settings: Settings, config: PretrainedConfig) -> Strategy:
    """How a model of `config` chooses tokens under `settings`. Raises Refusal, as `merged` does, and for unknown
    tokens.
    """
    place = settings.model.path
    origin = ("model", settings.model.name) if place is None else ("model.path", place)
    strategy = merged(settings.generation, fields_of(settings.model, config), origin, settings.seed)
    _check(strategy, config)
    return strategy


def as_record(strategy: Strategy) -> dict[str, Setting]:
    """The record's `generation_config`: each field with its value, its source, and why it is moot where it is."""
    return {
        name: Setting(value=each.value, source=each.source, **({"moot": each.moot} if each.moot else {}))
        for name, each in sorted(strategy.settings.items())
    }


def _check(strategy: Strategy, config: PretrainedConfig) -> None:
    """Raise Refusal for fields that a model of `config` cannot use."""
    fields, vocabulary = strategy.processed, config.get_text_config(decoder=True).vocab_size
    blank = GenerationConfig()
    for name, value in fields.items():
        if not hasattr(blank, name):
            raise strategy.refusal(name, "this transformers has no such field")
        unknown = [token for token in _tokens(value) if token >= vocabulary] if name in INDEXING else []
        if unknown:
            raise strategy.refusal(
                name, f"it has token {max(unknown)}, and the model's vocabulary has {vocabulary}"
            )
    if "exponential_decay_length_penalty" in fields and not strategy.ends:
        name, reason = "exponential_decay_length_penalty", "it raises an end token, and there is none"
        raise strategy.refusal(name, reason)
    try:
        processors(strategy, config, torch.zeros(1, 2, dtype=torch.int64), 2)
    except ValueError as error:
        raise strategy.refusal(next(iter(fields)), f"transformers refuses it: {first_line(error)}") from error


def _tokens(value: Any) -> Iterator[int]:
    """Every whole number in `value`."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _tokens(each)
