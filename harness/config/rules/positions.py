"""How many positions a model has, by its transformers config: no sequence is longer, prompt and new tokens together.

It reads the config as a mapping, of which a `config.json` has what was written there and `to_dict` has all: so it is
asked twice, without torch and of the config itself.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from harness.config.rules.generation import given
from harness.config.rules.sources import text_of
from harness.config.settings import NEW_TOKENS, Refusal, Settings

NAMES = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions"),
    *("model_max_length", "n_ctx", "seq_length"),
)
"""What configs call their positions, the first that is there."""

OWN = {"mpt": "max_seq_len", "whisper": "max_target_positions"}
"""Model types that read one of these and never the first, which a group's shape may have for other models."""

ORIGINAL = "original_max_position_embeddings"
"""What there were before they were stretched, where a config has both."""

NONE = frozenset(
    {
        *("bloom", "cpmant", "xlnet"),  # by the distance between tokens
        *("falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"),  # by a state
    }
)
"""Model types that take any length, whatever is in their config: others have written a training length there."""

AFTER_PADDING = frozenset(
    {
        *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
"""Model types whose table of positions has rows for padding, up to `pad_token_id`: what is left is for tokens."""

STRETCHED = frozenset({"dynamic", "linear", "yarn"})
"""Kinds of rope that take `factor` times the positions; of the others the config says what they come to."""

ALREADY = ("gemma3",)
"""Beginnings of model types whose config says what a linear rope comes to, too."""


class Limit(NamedTuple):
    """The most `tokens` of a sequence, and the attributes that say so."""

    tokens: int
    said: str


def check(settings: Settings, config: Mapping[str, Any]) -> None:
    """Refuse sequences that are longer than a model of `config` has positions, as far as knobs say their lengths."""
    most, train, generation = limit(config), settings.train, settings.generation
    if most is None:
        return
    allows = f"the model allows {most.tokens} tokens ({most.said})"
    if settings.mode == "train" and train.sequence > most.tokens:
        raise Refusal("train.sequence", train.sequence, allows)
    new = generation.max_new_tokens or (NEW_TOKENS if settings.model.path is None else 1)
    asked = new + (1 if given(generation) else generation.prompt_length)
    if settings.mode == "infer" and asked > most.tokens:
        key, value = "generation.max_new_tokens", new
        if asked - value >= most.tokens:
            key, value = "generation.prompt_length", generation.prompt_length
        raise Refusal(key, value, f"prompt and new tokens are {asked}, and {allows}")


def limit(config: Mapping[str, Any]) -> Limit | None:
    """That of a model's config; None where it has none, or does not say one.

    Rope computes beyond what it was trained for, but what it gives there is no text: that is a limit like a table's.
    One that is stretched has `factor` times its positions: those before, where a config says them, else all that it
    says. Some configs say the result; of the two the larger is taken.
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
        return Limit(tokens - rows, f"{name}={tokens} but for the {rows} of padding")
    said = [Limit(tokens, name)]
    if not kind.startswith(ALREADY):
        said += _stretched(shape, name)
    return max(said, key=lambda each: each.tokens)


def _stretched(shape: Mapping[str, Any], name: str) -> Iterator[Limit]:
    """What each rope in `shape` comes to: there may be one for each kind of layer."""
    key = "rope_scaling" if isinstance(shape.get("rope_scaling"), Mapping) else "rope_parameters"
    given = shape.get(key)
    if not isinstance(given, Mapping):
        return
    for rope in (given, *(each for each in given.values() if isinstance(each, Mapping))):
        factor, own = rope.get("factor"), shape.get(ORIGINAL) or rope.get(ORIGINAL)
        if rope.get("rope_type", rope.get("type")) in STRETCHED and _positive(factor):
            before, told = (own, ORIGINAL) if _positive(own) else (shape[name], name)
            yield Limit(int(before * factor), f"{told}={before} x factor={factor:g} of {key}")


def _positive(value: object) -> TypeGuard[float]:
    """Whether it is a number that counts something: -1 and null are how configs say that nothing does."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
