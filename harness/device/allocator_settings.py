"""The text of PYTORCH_ALLOC_CONF, as PyTorch's native CUDA allocator understands it.

Read: `c10/core/AllocatorConfig.h` and `c10/cuda/CUDAAllocatorConfig.h` of torch 2.13.0 (installed with it), and
`AllocatorConfig.cpp` and `CUDAAllocatorConfig.cpp` of the main branch shortly before it, whose limits were tried on
torch 2.13.0's own parser. Where releases differ:

- `large_segment_size_mb` exists since about 2.10. Before, the size was always 20 MiB.
- `>` in `roundup_power2_divisions` begins behind the last interval; earlier it also replaced that interval.
- `garbage_collection_threshold` needs a memory fraction below 1; earlier it was enough to set any, also 1.

This parser is stricter than torch's in one way: torch reads `32x` as 32 and does not look at every separator.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

MIB = 1024**2
INTERVALS = 16
"""Powers of two that have divisions of their own: from 1 MiB to 32 GiB. Smaller and larger sizes take the nearest."""

_OPTION = re.compile(r"([^:,\[\]]+):(\[[^\[\]]*\]|[^:,\[\]]+)(?:,|$)")


@dataclass(frozen=True)
class Settings:
    """The options of the native allocator. Sizes in bytes."""

    expandable_segments: bool = False
    max_split_size: int | None = None
    """A block of this size or more is never split. None: every block may be."""
    max_non_split_rounding_size: int = 20 * MIB
    """By how much less a block that is never split may exceed the request that takes it."""
    large_segment_size: int = 20 * MIB
    """What a request of more than 1 and less than 10 MiB reserves; also a page of a large expandable segment."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    """Steps into which the way to the next power of two is divided, for each of the `INTERVALS`. 0 and 1: none."""
    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which unused segments are freed. It needs a memory fraction below 1."""
    per_process_memory_fraction: float = 1.0
    """Share of the card's memory that this process may reserve."""
    ignored: tuple[str, ...] = ()
    """Options that were given and change nothing here: of pinned host memory, of locks, of CUDA graphs."""


def parse(text: str) -> Settings:
    """The settings that `text` means, such as `expandable_segments:True,max_split_size_mb:128`.

    Raises ValueError, a sentence with the option, its value and what would do.
    """
    options = _options(text)
    for name, value in options.items():
        if name not in _VALID:
            known = ", ".join(sorted(_VALID))
            raise ValueError(f"{name}:{value}: the CUDA allocator has no such option; it has {known}")
        valid, remedy = _VALID[name]
        if not valid(value):
            raise ValueError(f"{name}:{value}: {remedy}")
    large = _mib(options, "large_segment_size_mb", 20 * MIB)
    for name in ("max_split_size_mb", "max_non_split_rounding_mb"):
        if name in options and _mib(options, name, 0) < large:
            raise ValueError(
                f"{name}:{options[name]}: give {large // MIB} or more, the MiB of a large segment"
            )
    return Settings(
        expandable_segments=options.get("expandable_segments") == "True",
        max_split_size=_mib(options, "max_split_size_mb", 0) or None,
        max_non_split_rounding_size=_mib(options, "max_non_split_rounding_mb", large),
        large_segment_size=large,
        roundup_power2_divisions=_divisions(options.get("roundup_power2_divisions", "[1:0]")),
        garbage_collection_threshold=float(options.get("garbage_collection_threshold", 0.0)),
        per_process_memory_fraction=float(options.get("per_process_memory_fraction", 1.0)),
        ignored=tuple(name for name in options if name in _WITHOUT_EFFECT),
    )


def _options(text: str) -> dict[str, str]:
    """The value of each option in `text`, by name. The last one counts. Raises ValueError."""
    compact, at, options = re.sub(r"\s", "", text), 0, dict[str, str]()
    while at < len(compact):
        option = _OPTION.match(compact, at)
        if option is None:
            raise ValueError(f"{compact[at:]}: give option:value, and a comma between two options")
        options[option[1]], at = option[2], option.end()
    return options


def _mib(options: Mapping[str, str], name: str, default: int) -> int:
    """The bytes of an option that is given in MiB."""
    return int(options[name]) * MIB if name in options else default


def _divisions(value: str) -> tuple[int, ...]:
    """Divisions for each interval, of `4` or of `[256:1,512:2,>:4]`, where 256 stands for 256 MiB up to 512 MiB.

    The first pair also counts for all that is smaller, and `>` for all that is larger than the pair before it.
    """
    if not value.startswith("["):
        return (int(value),) * INTERVALS
    divisions, last = [0] * INTERVALS, 0
    for number, (boundary, steps) in enumerate(_pairs(value)):
        if boundary == ">":
            divisions[last + 1 :] = [int(steps)] * (INTERVALS - last - 1)
            continue
        last = min(int(boundary).bit_length() - 1, INTERVALS - 1)
        if number == 0:
            divisions[:last] = [int(steps)] * last
        divisions[last] = int(steps)
    return tuple(divisions)


def _pairs(value: str) -> Iterable[tuple[str, str]]:
    """What stands before and after each colon of `[256:1,>:4]`."""
    return ((boundary, steps) for boundary, _, steps in (e.partition(":") for e in value[1:-1].split(",")))


def _power_of_two(value: str) -> bool:
    return value.isdecimal() and int(value).bit_count() == 1


def _valid_divisions(value: str) -> bool:
    if not value.startswith("["):
        return _power_of_two(value)
    return all(
        (boundary == ">" or _power_of_two(boundary)) and (steps == "0" or _power_of_two(steps))
        for boundary, steps in _pairs(value)
    )


def _between(value: str, lowest: float, highest: float) -> bool:
    """Whether `value` is a number from `lowest` to `highest`."""
    try:
        return lowest <= float(value) <= highest
    except ValueError:
        return False


_Rule = tuple[Callable[[str], bool], str]

_SWITCH: _Rule = (lambda value: value in ("True", "False"), "give True or False")
_WHOLE: _Rule = (lambda value: value.isdecimal(), "give a whole number of MiB")

_WITHOUT_EFFECT: dict[str, _Rule] = {
    "pinned_use_background_threads": _SWITCH,
    "pinned_use_cuda_host_register": _SWITCH,
    "pinned_use_hip_host_register": _SWITCH,
    "pinned_free_catch_all": _SWITCH,
    "pinned_max_round_threshold_mb": _WHOLE,
    "pinned_max_cached_size_mb": _WHOLE,
    "pinned_reserve_segment_size_mb": (
        lambda value: value.isdecimal() and int(value) > 0,
        "give a whole number of MiB, 1 or more",
    ),
    "pinned_num_register_threads": (
        lambda value: _power_of_two(value) and int(value) <= 128,
        "give a power of two, at most 128",
    ),
    "release_lock_on_cudamalloc": _SWITCH,
    "release_lock_on_hipmalloc": _SWITCH,
    "graph_capture_record_stream_reuse": _SWITCH,
    "throw_on_cudamalloc_oom": _SWITCH,  # when it raises, not what it reserves
}

_VALID: dict[str, _Rule] = {
    "backend": (
        lambda value: value == "native",
        "only the native backend is known here; with cudaMallocAsync the driver decides what is reserved; leave it out",
    ),
    "expandable_segments": _SWITCH,
    "max_split_size_mb": _WHOLE,
    "max_non_split_rounding_mb": _WHOLE,
    "large_segment_size_mb": (
        lambda value: value.isdecimal() and int(value) > 10,
        "give a whole number of MiB above 10",
    ),
    "roundup_power2_divisions": (
        _valid_divisions,
        "give a power of two, or pairs of powers of two such as [256:1,512:2,>:4], where 0 divisions round nothing",
    ),
    "garbage_collection_threshold": (
        lambda value: _between(value, 0, 1) and 0 < float(value) < 1,
        "give a share between 0 and 1, neither of them",
    ),
    "per_process_memory_fraction": (
        lambda value: _between(value, 0, 1),
        "give a share from 0 to 1",
    ),
    **_WITHOUT_EFFECT,
}
"""Of each option of torch 2.13: which values it takes, and what to give instead of another."""
