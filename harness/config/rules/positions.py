"""How many positions a model has, by its transformers config. Prompt and new tokens together cannot be more.

It reads the config as a mapping. It runs twice: early and without torch on `config.json`, which has only the keys
that were written, and later on the config's `to_dict`, which has all keys.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from harness.config.rules.generation import has_prompts
from harness.config.rules.sources import text_of
from harness.config.settings import NEW_TOKENS, Refusal, Settings

NAMES = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions"),
    *("model_max_length", "n_ctx", "seq_length"),
)
"""The names of the number of positions in configs; the first name present counts."""

OWN = {"mpt": "max_seq_len", "whisper": "max_target_positions"}
"""Model types that read only this name. A group's shape may also have the first name, for other models."""

ORIGINAL = "original_max_position_embeddings"
"""The number of positions before rope scaling, where a config has both numbers."""

NONE = frozenset(
    {
        *("bloom", "cpmant", "xlnet"),  # by the distance between tokens
        *("falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"),  # by a state
    }
)
"""Model types that take any length. A number of positions in their config is only the training length."""

AFTER_PADDING = frozenset(
    {
        *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
"""Model types whose position table reserves the rows up to `pad_token_id` for padding; tokens use the other rows."""

STRETCHED = frozenset({"dynamic", "linear", "yarn"})
"""Kinds of rope that have `factor` times the positions. For the other kinds the config has the scaled number."""

ALREADY = ("gemma3",)
"""Prefixes of model types whose config has the scaled number for a linear rope too."""


class Limit(NamedTuple):
    """The most `tokens` of a sequence, and `source`, the config attributes that say so."""

    tokens: int
    source: str


def check(settings: Settings, config: Mapping[str, Any]) -> None:
    """Refuse sequences longer than the positions of a model of `config`, as far as the settings have the lengths."""
    model_limit, train, generation = limit(config), settings.train, settings.generation
    if model_limit is None:
        return
    allows = f"the model allows {model_limit.tokens} tokens ({model_limit.source})"
    if settings.mode == "train" and train.sequence > model_limit.tokens:
        raise Refusal("train.sequence", train.sequence, allows)
    new = generation.max_new_tokens or (NEW_TOKENS if settings.model.path is None else 1)
    tokens = new + (1 if has_prompts(generation) else generation.prompt_length)
    if settings.mode == "infer" and tokens > model_limit.tokens:
        key, value = "generation.max_new_tokens", new
        if tokens - value >= model_limit.tokens:
            key, value = "generation.prompt_length", generation.prompt_length
        raise Refusal(key, value, f"prompt and new tokens are {tokens}, and {allows}")


def limit(config: Mapping[str, Any]) -> Limit | None:
    """The limit of a model's config; None where the model has no limit, or the config does not say it.

    Rope still computes beyond its trained positions, but the output is not usable text: so they are a limit, as a
    position table is. A scaled rope has `factor` times the original positions; where the config has no original
    number, it has `factor` times the written number. Some configs write the result instead: the larger one counts.
    """
    shape = text_of(config)
    kind = str(shape.get("model_type") or "")
    by_distance = shape.get("alibi") or shape.get("position_embedding_type") == "alibi"
    if kind in NONE or by_distance:
        return None
    names = (OWN[kind],) if kind in OWN else NAMES
    name = next((name for name in names if _positive(shape.get(name))), None)
    if name is None:
        return None
    tokens = int(shape[name])
    if kind in AFTER_PADDING:
        padding = shape.get("pad_token_id", 1)
        rows = padding + 1 if isinstance(padding, int) else 0
        return Limit(tokens - rows, f"{name}={tokens} without the {rows} of padding")
    limits = [Limit(tokens, name)]
    if not kind.startswith(ALREADY):
        limits += _scaled_limits(shape, name)
    return max(limits, key=lambda each: each.tokens)


def _scaled_limits(shape: Mapping[str, Any], name: str) -> Iterator[Limit]:
    """The limit of each scaled rope in `shape`. There may be one rope for each kind of layer."""
    key = "rope_scaling" if isinstance(shape.get("rope_scaling"), Mapping) else "rope_parameters"
    parameters = shape.get(key)
    if not isinstance(parameters, Mapping):
        return
    for rope in (parameters, *(each for each in parameters.values() if isinstance(each, Mapping))):
        factor, own = rope.get("factor"), shape.get(ORIGINAL) or rope.get(ORIGINAL)
        if rope.get("rope_type", rope.get("type")) in STRETCHED and _positive(factor):
            before, field = (own, ORIGINAL) if _positive(own) else (shape[name], name)
            yield Limit(int(before * factor), f"{field}={before} x factor={factor:g} of {key}")


def _positive(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number above 0. Configs write -1 or null where they have no number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
