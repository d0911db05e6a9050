"""Checks the numbers in a model's config that decide the shapes of its parameters.

Their names differ among transformers' configs, but the endings of the names do not. transformers checks the rest.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeGuard

from harness.config.rules.sources import read, text_of
from harness.config.settings import Refusal

COUNTS = re.compile(
    r"(.*_)?(size|dim|heads|layers|experts|rank|hidden|per_tok|topk)|n_(embd|head|layer|inner|heads|layers)"
    r"|d_(model|ff|kv|head|inner|state|conv)|expand"
)
"""Names of whole numbers, 0 or more. Some configs have null or "auto" there, or true where such a part exists."""

HEAD = re.compile(r"head_(dim|size)$|^(d_kv|kv_channels)$")
"""Names of a head's width. Without one of them, the heads divide the hidden size."""

OF_OTHERS = re.compile(r"(audio|encoder|image|quantization|speech|vision)_.*")
"""Nested configs that are not for text, or that have their own rules."""

NEVER_NONE = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "num_hidden_layers",
        "num_attention_heads",
    ),
    *("num_key_value_heads", "num_experts_per_tok", "n_embd", "n_head", "n_layer", "d_model"),
)
"""Names of whole numbers that must be 1 or more."""

WIDEST = 2**24
"""Sixteen times the widest vocabulary or layer that any model has. Products of wider ones have no number of bytes."""

MOST_LAYERS = 10_000
"""Modules are made one by one, also of a model without memory."""

LAYERS = re.compile(r"(.*_)?layers|n_layers?")

POSITIVE = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "factor")
"""Names of divisors and of bases of powers: they must be above 0."""

DROPPED = re.compile(r"(.*_)?(dropout|dropout_p|dropout_prob|pdrop|layerdrop)")
"""Names of dropout probabilities."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k")


def check(shape: Mapping[str, Any], prefix: str) -> None:
    """Refuse a model's config with an impossible width. `prefix` comes before a name in the Refusal."""
    for path, value in _scalars(shape):
        if (remedy := _remedy(path.rpartition(".")[2], value)) is not None:
            raise Refusal(prefix + path, value, remedy)
    _heads(shape, prefix)
    text = text_of(shape)
    experts = next(((name, text[name]) for name in EXPERTS if _is_integer(text.get(name))), None)
    for name in CHOSEN:
        if experts and _is_integer(text.get(name)) and text[name] > experts[1]:
            raise Refusal(
                prefix + name, text[name], f"there are {experts[0]}={experts[1]}; use as many or fewer"
            )


@lru_cache(maxsize=1024, typed=True)  # a search checks one model in thousands of configs
def _remedy(name: str, value: object) -> str | None:
    """What `value` should be, if it is impossible for `name`; else None."""
    number = _number(value)
    if name in NEVER_NONE and not (_is_integer(value) and value >= 1):
        return "should be a whole number, 1 or more"
    if COUNTS.fullmatch(name) and number < 0:
        return "should be a whole number, 0 or more"
    if LAYERS.fullmatch(name) and number > MOST_LAYERS:
        return f"should be {MOST_LAYERS:,} or less: a layer has modules, which are made one by one"
    if COUNTS.fullmatch(name) and number > WIDEST:
        return f"should be {WIDEST:,} or less: no model is wider than a sixteenth of that"
    if name in POSITIVE and not 0 < number < math.inf:
        return "should be a number above 0"
    if name.endswith(("_eps", "_epsilon")) and not 0 <= number < math.inf:
        return "should be a number, 0 or more"
    if DROPPED.fullmatch(name) and not 0 <= number <= 1:
        return "should be a number from 0 to 1"
    return None


def _number(value: object) -> float:
    """`value`; not a number where it is none, and infinite where no float is as large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _heads(shape: Mapping[str, Any], prefix: str) -> None:
    heads, kv_heads, hidden = (
        read(shape, name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if not all(value is None or _is_integer(value) for _, value in (heads, kv_heads, hidden)):
        return  # a list: one value for each layer
    if heads[1] and kv_heads[1] and heads[1] % kv_heads[1]:
        raise Refusal(prefix + kv_heads[0], kv_heads[1], f"must divide {heads[0]}={heads[1]} evenly")
    text = text_of(shape)
    width = text.get("head_dim")
    if heads[1] and hidden[1] and not any(HEAD.search(name) for name, each in text.items() if each):
        if hidden[1] % heads[1]:
            raise Refusal(prefix + hidden[0], hidden[1], f"must be a multiple of {heads[0]}={heads[1]}")
        width = hidden[1] // heads[1]
    rotary = text.get("rope_parameters") or text.get("rope_theta")
    if rotary and not text.get("partial_rotary_factor") and isinstance(width, int) and width % 2:
        key, value = ("head_dim", width) if text.get("head_dim") else hidden
        reason = f"rotary positions turn pairs, and a head has {width}; head_dim should be even"
        raise Refusal(prefix + key, value, reason)


def _scalars(shape: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar in `shape` with its path, and each number of a list. Null values are left out."""
    for name, value in shape.items():
        if isinstance(value, Mapping):
            yield from () if OF_OTHERS.fullmatch(name) else _scalars(value, f"{prefix}{name}.")
        else:
            numbers = (
                [each for each in value if not isinstance(each, str)] if isinstance(value, list) else [value]
            )
            yield from ((f"{prefix}{name}", each) for each in numbers if isinstance(each, int | float | str))


def nothing(shape: Mapping[str, Any]) -> str | None:
    """The path of the first count in `shape` that is 0; None where there is none."""
    counts = ((path, value) for path, value in _scalars(shape) if COUNTS.fullmatch(path.rpartition(".")[2]))
    return next((path for path, value in counts if value == 0), None)
