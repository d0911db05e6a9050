"""Refuses a request that needs more memory than the machine has, and says what was free where memory ran out."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import NamedTuple

import psutil
import torch

from harness.config.settings import Model, Refusal, Settings
from harness.tables import size

GIB = 2**30
WIDEST = 2**20
"""No published model has a vocabulary or a width above this."""

_FAILED_ALLOCATION = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGTP]iB)")
"""torch's message of a failed allocation: in bytes on a CPU, rounded on a GPU."""
_SIZE_OVERFLOW = re.compile(
    "Storage size calculation overflowed|Overflow when unpacking long|integer multiplication overflow"
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40, "PiB": 2**50}

_SIZES = {
    "train": {"train.micro_batch": 4, "train.sequence": 256},
    "infer": {
        "generation.batch": 4,
        "generation.prompt_length": 64,
        "generation.max_new_tokens": 64,
        "generation.pages": 64,
    },
}
"""The config keys that set the size of a mode's tensors, each with a value that fits a small machine."""


class Shortage(NamedTuple):
    """An allocation that failed: the bytes that were `asked` for, and those of the `device` that were `free` then."""

    asked: int | None
    """None: not known."""
    free: int
    total: int
    device: str

    def sentence(self) -> str:
        """The shortage in words."""
        asked = "more" if self.asked is None else size(self.asked)
        return (
            f"out of memory: {asked} was asked for, and {size(self.free)} of the {self.device}'s "
            f"{size(self.total)} are free"
        )


class NotFree(MemoryError):
    """The machine has the memory, and it is not free now."""


def shortage(error: BaseException) -> Shortage | None:
    """What was asked for and what is free now, where `error` says that an allocation failed; None for other errors."""
    asked = bytes_wanted(error)
    if asked is None and not isinstance(error, MemoryError):
        return None
    device = torch.device("cuda" if "CUDA out of memory" in str(error) else "cpu")
    return Shortage(None if asked in (None, inf) else int(asked), *_memory(device), device.type)


def check_parameters(settings: Model, needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model, or a part of one, whose parameters need more bytes than the machine has.

    Raises NotFree where others use what it would need.
    """
    free, total = _memory(device)
    if needed <= free:
        return
    key, value = _model_key(settings)
    needs = f"its parameters are {needed / GIB:,.1f} GiB in {str(dtype)[6:]}"
    if needed > total:
        remedy = f"{needs}, and the {device.type} has {total / GIB:.1f} GiB; use a smaller model or a machine with more"
        raise Refusal(key, value, remedy)
    raise NotFree(
        f"{key}={value}: {needs}, and {free / GIB:.1f} of the {device.type}'s {total / GIB:.1f} GiB are free"
    )


@contextmanager
def allocations(settings: Settings, device: torch.device) -> Iterator[None]:
    """Refuse a run that fails inside this context because one tensor is larger than all memory of `device`.

    Otherwise another process may have used the memory: then the run has failed, and the request may be right.
    """
    try:
        yield
    except (RuntimeError, TypeError, OverflowError) as error:
        needed = bytes_wanted(error)
        _, total = _memory(device)
        if needed is None or needed <= total:
            raise
        size = "more bytes than 64 bits can count" if needed == inf else f"{needed / GIB:,.1f} GiB"
        raise Refusal(
            *_largest_key(settings),
            f"it needs a tensor of {size}, and the {device.type} has {total / GIB:.1f} GiB; use less, or a machine "
            "with more",
        ) from error


def bytes_wanted(error: BaseException) -> float | None:
    """Bytes of the failed allocation, inf if they exceed 2**63. None if `error` is another error."""
    if match := _FAILED_ALLOCATION.search(str(error)):
        return round(float(match[1]) * _UNITS[match[2]])
    return inf if _SIZE_OVERFLOW.search(str(error)) else None


def _memory(device: torch.device) -> tuple[int, int]:
    """Free bytes and total bytes of `device`."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    memory = psutil.virtual_memory()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return memory.available, memory.total
    left = max(0, limit - psutil.Process().memory_info().vms)
    return min(memory.available, left), min(memory.total, limit)


def _model_key(settings: Model) -> tuple[str, object]:
    """The key that chooses the model, and its value: a size in its config that no model has, else its name."""
    sizes = {key: value for key, value in settings.config.items() if type(value) is int and value > WIDEST}
    if sizes:
        key = max(sizes, key=lambda name: sizes[name])
        return f"model.config.{key}", sizes[key]
    return ("model.path", settings.path) if settings.path else ("model", settings.name)


def _largest_key(settings: Settings) -> tuple[str, object]:
    """The size key that most exceeds its usual value, and its value. The model's key if none exceeds it."""
    usual, values = _SIZES[settings.mode], {}
    for key in usual:
        room, name = key.split(".")
        if (value := getattr(getattr(settings, room), name)) is not None:
            values[key] = value
    key = max(values, key=lambda candidate: values[candidate] / usual[candidate])
    return (key, values[key]) if values[key] > usual[key] else _model_key(settings.model)
