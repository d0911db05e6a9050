"""What a machine has not the memory for is a wrong request: which key asks for it, and what there is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import psutil
import torch

from harness.config.settings import Model, Refusal, Settings

GIB = 2**30
WIDEST = 2**20
"""No published model has a vocabulary or a width above it."""

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGTP]iB)")
"""What torch says of an allocation that failed, on a CPU in bytes, on a GPU rounded."""
_OVERFLOWS = re.compile("Storage size calculation overflowed|Overflow when unpacking long")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40, "PiB": 2**50}

_SIZES = {
    "train": ("train.micro_batch", "train.sequence"),
    "infer": (
        "generation.batch",
        "generation.prompt_length",
        "generation.max_new_tokens",
        "generation.pages",
    ),
}
"""The keys that a mode's tensors grow with, each with a default that a small machine has the memory for."""
_USUAL = {
    "train.micro_batch": 4,
    "train.sequence": 256,
    "generation.batch": 4,
    "generation.prompt_length": 64,
    "generation.max_new_tokens": 64,
    "generation.pages": 64,
}


def check_parameters(settings: Model, needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model, or a part of one, whose parameters take `needed` bytes where fewer are free."""
    free, _ = _memory(device)
    if needed > free:
        key, value = _of_model(settings)
        raise Refusal(
            key,
            value,
            f"its parameters are {needed / GIB:,.1f} GiB in {str(dtype)[6:]}, and {free / GIB:.1f} GiB of "
            f"{device.type} memory are free; use a smaller model or a machine with more",
        )


@contextmanager
def allocations(settings: Settings, device: torch.device) -> Iterator[None]:
    """Within it a run that fails is refused where one tensor alone is larger than all of `device`'s memory.

    Where it is not, another run on the machine may have the rest: then the run failed, and the request may be right.
    """
    try:
        yield
    except (RuntimeError, TypeError, OverflowError) as error:
        needed = bytes_wanted(error)
        _, total = _memory(device)
        if needed is None or needed <= total:
            raise
        size = "more bytes than there are numbers for" if needed == inf else f"{needed / GIB:,.1f} GiB"
        raise Refusal(
            *_largest(settings),
            f"it asks for a tensor of {size}, and the {device.type} has {total / GIB:.1f} GiB; use less, or a machine "
            "with more",
        ) from error


def bytes_wanted(error: Exception) -> float | None:
    """The bytes of the allocation that failed, inf where they are above 2**63; None where `error` is another."""
    if says := _ASKED.search(str(error)):
        return round(float(says[1]) * _UNITS[says[2]])
    return inf if _OVERFLOWS.search(str(error)) else None


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free on `device`, and all that it has."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _of_model(settings: Model) -> tuple[str, object]:
    """The key that asks for the model, and its value: of its config's sizes one that no model has, else its name."""
    sizes = {key: value for key, value in settings.config.items() if type(value) is int and value > WIDEST}
    for key in sorted(sizes, key=lambda each: sizes[each], reverse=True):
        return f"model.config.{key}", sizes[key]
    return ("model.path", settings.path) if settings.path else ("model", settings.name)


def _largest(settings: Settings) -> tuple[str, object]:
    """The key of a run's sizes that is furthest above what it usually is, and its value; the model where none is."""
    values = {}
    for key in _SIZES[settings.mode]:
        room, name = key.split(".")
        if (value := getattr(getattr(settings, room), name)) is not None:
            values[key] = value
    key = max(values, key=lambda each: values[each] / _USUAL[each])
    return (key, values[key]) if values[key] > _USUAL[key] else _of_model(settings.model)
