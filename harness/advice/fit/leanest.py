"""Which combinations need the fewest bytes, as far as their values alone let expect it."""

from collections.abc import Mapping, Sequence

from harness.advice.fit.combination import Combination

LEANER = {
    "zero.offload": {"all": 0, "optimizer": 1, "none": 2},
    "checkpointing": {"full": 0, "selective": 1, "none": 1},
    "checkpointing.offload": {"cpu": 0, "none": 1},
    "optimizer": {"sgd": 0, "lion": 1, "adamw_8bit": 1, "adamw": 2},
    "optimizer.state": {"bf16": 0, "fp32": 1},
    "adapter": {"qlora": 0, "lora": 1, "dora": 2, "none": 2},
}
"""Values by the bytes they let a model of many layers need, the fewest first. Of two with one number, or of one that is
not here, it is not known which needs less: ZeRO-3 gathers all of a small model, and a chunk of a loss has buffers.
"""

LENGTHS = ("train.sequence", "generation.prompt_length", "generation.max_new_tokens")
"""Keys of which a larger value needs more."""


def leanest(combinations: Sequence[Combination]) -> list[Combination]:
    """Those that no other is expected to need less than by its values alone."""
    values = {each.overrides: _values(each) for each in combinations}
    kept: list[Combination] = []
    for each in sorted(combinations, key=lambda each: _sum(values[each.overrides])):
        own = values[each.overrides]
        if not any(_is_leaner(values[other.overrides], own) for other in kept):
            kept.append(each)
    return [each for each in combinations if each in kept]


def _values(combination: Combination) -> dict[str, str]:
    return dict(override.partition("=")[::2] for override in combination.overrides)


def _sum(values: Mapping[str, str]) -> int:
    """A number that is lower for the leaner of two that can be compared."""
    return sum(_place(key, value) or 0 for key, value in values.items())


def _is_leaner(values: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether `values` differ from `others` only where they need less."""
    return all(_needs_less(key, value, others[key]) for key, value in values.items())


def _needs_less(key: str, value: str, other: str) -> bool:
    if value == other:
        return True
    own, theirs = _place(key, value), _place(key, other)
    comparable = own is not None and theirs is not None
    return comparable and own < theirs  # type: ignore[operator]


def _place(key: str, value: str) -> int | None:
    if key in LENGTHS:
        return int(value) if value.isdecimal() else None
    return LEANER.get(key, {}).get(value)
