"""The keys along which `harness fit` searches, and the values that `?` stands for."""

from collections.abc import Mapping

from harness.config.groups import defaults, groups
from harness.config.settings import Refusal, described_fields

OPEN = "?"
"""As a value: all that there are."""

AXES = {
    "train": {
        "zero": "0,1,2,3",
        "zero.offload": "none",
        "pipeline.stages": "1",
        "checkpointing": "none,selective,full",
        "checkpointing.offload": "",
        "loss": "",
        "optimizer": "",
        "optimizer.state": "",
        "adapter": "",
        "train.sequence": "",
        "train.micro_batch": "",
    },
    "infer": {
        "pipeline.stages": "",
        "generation.tensor_parallel": "",
        "generation.cache": "",
        "generation.prompt_length": "64",
        "generation.max_new_tokens": "64",
        "generation.batch": "",
    },
}
"""Keys that take a list, with their defaults. The last key is searched: a larger value needs more bytes. Those without
a default are no axis where the user gives neither a list nor `?`.
"""

SPLITS = ("pipeline.stages", "generation.tensor_parallel")
"""Numbers by which a world is divided: `?` is each power of two up to `MOST_SPLITS`."""

MOST_SPLITS = 16


def axes(mode: str, typed: Mapping[str, str]) -> dict[str, str]:
    """The axes of a request and the list of each; the searched one, whose list may be empty, is last. Raises Refusal
    for a `?` that stands for no values.
    """
    own = AXES[mode]
    for key, value in typed.items():
        if value == OPEN and key not in own:
            raise Refusal(
                key, OPEN, f"fit tries no values of it by itself; it does of {', '.join(open_to(mode))}"
            )
    *others, searched = own
    chosen = {key: typed.get(key, own[key]) for key in others}
    chosen = {key: text for key, text in chosen.items() if own[key] or "," in text or text == OPEN}
    values = typed.get(searched, own[searched])
    return {
        **{key: ",".join(choices(key)) if text == OPEN else text for key, text in chosen.items()},
        searched: "" if values == OPEN else values,
    }


def open_to(mode: str) -> list[str]:
    """The axes of `mode` that take `?`."""
    *others, searched = AXES[mode]
    return [*(key for key in others if _choices(key)), searched, "world.size"]


def choices(key: str) -> list[str]:
    """The values that `?` stands for, the default first. Raises Refusal for an axis that has no list of its own."""
    if found := _choices(key):
        return found
    raise Refusal(key, OPEN, "any number is possible; give a list, as 512,2048")


def _choices(key: str) -> list[str]:
    if key in SPLITS:
        return [str(2**power) for power in range(MOST_SPLITS.bit_length())]
    if key in groups():
        first, options = defaults()[key], groups()[key]
    else:
        field = described_fields().get(key)
        first, options = ("", []) if field is None else (str(field.default), [*field.choices])
    return sorted(options, key=lambda option: option != first)
