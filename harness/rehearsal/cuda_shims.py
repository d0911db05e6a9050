"""Stand-ins for `torch.cuda` and `torch.accelerator`, so that a program's calls mean the card that is rehearsed.

Memory figures are the card's. Everything else does as little as it can: there is one device, its work is done at once,
and its random numbers have no values.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from harness.ledger.patch import DATA, TORCH, Patch
from harness.rehearsal.card import in_python
from harness.rehearsal.card_memory import current
from harness.rehearsal.cuda_streams import Event, Ranges, Stream

NO_CARD = "there is no such device here, and a program means the card that is rehearsed"
STAND_IN = f"{NO_CARD}; it does nothing, or answers for the card"


def is_available() -> bool:
    return True


def _lazy_init() -> None:
    pass


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    if device not in (None, -1):
        in_python(torch.device("cuda", device) if isinstance(device, int) else device)


def exchange_device(device: int) -> int:
    set_device(device)
    return 0


def synchronize(device: Any = None) -> None:
    pass


def get_device_name(device: Any = None) -> str:
    return current().page.name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    return current().card.version


def get_device_properties(device: Any = None) -> Any:
    major, minor = get_device_capability()
    return SimpleNamespace(
        name=current().page.name,
        major=major,
        minor=minor,
        total_memory=current().total,
        multi_processor_count=current().card.multiprocessors,
        max_threads_per_multi_processor=current().card.threads_per_multiprocessor,
        L2_cache_size=None,
        warp_size=32,
    )


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return including_emulation or current().card.capability >= 8


def current_stream(device: Any = None) -> Stream:
    return Stream(stream_id=current().stream)


def default_stream(device: Any = None) -> Stream:
    return Stream(stream_id=0)


@contextmanager
def stream(stream: Any) -> Iterator[None]:
    if stream is None:
        yield
    else:
        with stream:
            yield


def set_stream(stream: Any) -> None:
    if stream is not None:
        current().enter_stream(stream.stream_id)


def manual_seed(seed: int) -> None:
    pass


def get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8)  # on the host: a seed and an offset, of 8 bytes each


def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    pass


def memory_stats_as_nested_dict(device: Any = None) -> dict[str, Any]:
    return current().statistics()


def stream_of_index(device_index: Any = None, /) -> Stream:
    return current_stream()


def synchronize_index(device_index: Any = None, /) -> None:
    pass


def set_device_index(device_index: Any, /) -> None:
    set_device(device_index)


def is_current_stream_capturing() -> bool:
    return False


def memory_stats(device_index: Any = None, /) -> Any:
    return OrderedDict(sorted(_flat("", current().statistics())))


def _flat(prefix: str, tree: Any) -> Iterator[tuple[str, int]]:
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for name, value in tree.items():
        yield from _flat(f"{prefix}.{name}" if prefix else str(name), value)


def reset_peak_memory_stats(device: Any = None) -> None:
    current().reset_peak()


def reset_peak_of(device_index: Any = None, /) -> None:
    current().reset_peak()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return current().free, current().total


def get_memory_info(device_index: Any = None, /) -> tuple[int, int]:
    return mem_get_info()


def get_allocator_backend() -> str:
    return "native"


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    current().set_fraction(fraction)


def empty_cache() -> None:
    current().empty_cache()


def memory_snapshot(mempool_id: Any = None, include_traces: bool = True) -> Any:
    return current().snapshot()["segments"]


def _snapshot(device: Any = None, augment_with_fx_traces: bool = False) -> Any:
    return current().snapshot()


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    figures = current().statistics()
    return "\n".join(f"{name}: {value:,}" for name, value in _flat("", figures))


def _record_memory_history(*args: Any, **kwargs: Any) -> None:
    pass  # a rehearsal always records


def current_accelerator(check_available: bool = False) -> torch.device:
    return torch.device("cuda")


def get_device_module(device: Any = None) -> Any:
    return torch.cuda if device is None else getattr(torch, torch.device(device).type)


def by(stand_in: Any) -> Callable[[Any], Any]:
    """A replacement by `stand_in`, whatever the original is."""
    return lambda original: stand_in


_CUDA = {
    **dict.fromkeys(("is_available", "is_initialized"), is_available),
    **dict.fromkeys(("_lazy_init", "init", "ipc_collect", "seed"), _lazy_init),
    **dict.fromkeys(("manual_seed", "manual_seed_all"), manual_seed),
    "device_count": device_count,
    "current_device": current_device,
    "set_device": set_device,
    **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), exchange_device),
    "synchronize": synchronize,
    "get_device_name": get_device_name,
    "get_device_capability": get_device_capability,
    "get_device_properties": get_device_properties,
    "is_bf16_supported": is_bf16_supported,
    "current_stream": current_stream,
    "default_stream": default_stream,
    "stream": stream,
    "set_stream": set_stream,
    "is_current_stream_capturing": is_current_stream_capturing,
    "get_rng_state": get_rng_state,
    "set_rng_state": set_rng_state,
}
"""Stand-ins in `torch.cuda`."""

_MEMORY = {
    "empty_cache": empty_cache,
    "memory_stats_as_nested_dict": memory_stats_as_nested_dict,
    "mem_get_info": mem_get_info,
    "reset_peak_memory_stats": reset_peak_memory_stats,
    "memory_snapshot": memory_snapshot,
    "reset_accumulated_memory_stats": synchronize,
    "get_allocator_backend": get_allocator_backend,
    "memory_summary": memory_summary,
    "set_per_process_memory_fraction": set_per_process_memory_fraction,
}
"""Stand-ins in `torch.cuda` and in `torch.cuda.memory`, which has them too."""

_ACCELERATOR = {
    "is_available": is_available,
    "device_count": device_count,
    "current_device_index": current_device,
    "current_accelerator": current_accelerator,
    "current_stream": stream_of_index,
    "synchronize": synchronize_index,
    "set_device_index": set_device_index,
}
"""Stand-ins in `torch.accelerator`."""

_ACCELERATOR_MEMORY = {
    "memory_stats": memory_stats,
    "reset_peak_memory_stats": reset_peak_of,
    "empty_cache": empty_cache,
    "get_memory_info": get_memory_info,
}
"""Stand-ins in `torch.accelerator` and in `torch.accelerator.memory`, which has them too."""

CUDA_SHIMS = (
    *(
        Patch(owner, name, STAND_IN, TORCH, by(stand_in), optional=True)
        for owner, stand_ins in (
            ("torch.cuda", {**_CUDA, **_MEMORY}),
            ("torch.cuda.memory", {**_MEMORY, "_snapshot": _snapshot}),
            ("torch.accelerator", {**_ACCELERATOR, **_ACCELERATOR_MEMORY}),
            ("torch.accelerator.memory", _ACCELERATOR_MEMORY),
        )
        for name, stand_in in stand_ins.items()
    ),
    Patch("torch.cuda.memory", "_record_memory_history", NO_CARD, TORCH, by(_record_memory_history)),
    Patch("torch.cuda.nvtx", "_nvtx", NO_CARD, TORCH, by(Ranges()), unchecked=DATA),
    Patch("torch", "get_device_module", NO_CARD, TORCH, by(get_device_module), unchecked="torch caches it"),
    Patch("torch.cuda", "Stream", NO_CARD, TORCH, by(Stream), unchecked="it is a class with other options"),
    Patch("torch", "Stream", NO_CARD, TORCH, by(Stream), unchecked="it is a class with other options"),
    Patch("torch", "Event", NO_CARD, TORCH, by(Event), unchecked="it is a class with other options"),
    Patch("torch.cuda", "Event", NO_CARD, TORCH, by(Event), unchecked="it is a class with other options"),
)
"""What is replaced in `torch.cuda` and `torch.accelerator` while a card is rehearsed."""
