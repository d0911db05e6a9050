"""Stand-ins for `torch.cuda` and `torch.accelerator`, so that a program's calls mean the card that is rehearsed.

Memory figures are the card's. Everything else does as little as it can: there is one device, its work is done at once,
and its random numbers have no values.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from harness.ledger.patch import BUILTIN, DATA, TORCH, Patch
from harness.rehearsal.card import CARD
from harness.rehearsal.card_autocast import clearing
from harness.rehearsal.card_memory import current

NO_CARD = "there is no such device here, and a program means the card that is rehearsed"
STAND_IN = f"{NO_CARD}; it does nothing, or answers for the card"


class Stream:
    """A stream of the card. Its work is done at once, so that nobody waits; what it allocates stays its own."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device, self.priority = CARD, priority
        self.stream_id = self.cuda_stream = current().new_stream()

    def wait_stream(self, stream: Any) -> None:
        """Return at once, as do all others that wait."""

    wait_event = wait_stream

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Whether all work is done."""
        return True

    def is_capturing(self) -> bool:
        """Whether a graph is captured: never."""
        return False

    def record_event(self, event: Any = None) -> Any:
        """`event`, or a new one."""
        return event or Event()

    def __enter__(self) -> "Stream":
        self._before = current().stream
        current().enter_stream(self.stream_id)
        return self

    def __exit__(self, *exc: object) -> None:
        current().enter_stream(self._before)


class Event:
    """An event of the card. It has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take any options of the original."""

    def record(self, stream: Any = None) -> None:
        """Return at once, as does `wait`."""

    wait = record

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, end_event: Any) -> float:
        """Not a number: a rehearsal measures no time."""
        return math.nan


def _stream(stream_id: int) -> Stream:
    stream = Stream.__new__(Stream)
    stream.device, stream.priority, stream.stream_id, stream.cuda_stream = CARD, 0, stream_id, stream_id
    return stream


def is_available() -> bool:
    return True


def _lazy_init() -> None:
    pass


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device or CARD).index
    if index not in (None, 0, -1):
        raise RuntimeError(
            f"cuda:{index} is not there: a rehearsal has one card, cuda:0; rehearse each by itself"
        )


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
        warp_size=32,
    )


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return including_emulation or current().card.capability >= 8


def current_stream(device: Any = None) -> Stream:
    return _stream(current().stream)


def default_stream(device: Any = None) -> Stream:
    return _stream(0)


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


def record_stream(self: torch.Tensor, stream: Any) -> None:
    current().record_stream(self.untyped_storage()._cdata, stream.stream_id)


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


def _by(stand_in: Any) -> Callable[[Any], Any]:
    return lambda original: stand_in


def generator_class(original: Any) -> Any:
    """`torch.Generator`: for the card, one of the host; nothing that it generates has a value."""

    class Generator(original):
        def __new__(cls, device: Any = None) -> Any:
            return original.__new__(
                original, "cpu" if torch.device(device or "cpu").type == "cuda" else device
            )

    return Generator


def graph_class(original: Any) -> Any:
    """`torch.cuda.CUDAGraph`: it is refused."""

    class CUDAGraph:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError(
                "torch.cuda.CUDAGraph: a captured graph is not rehearsed; call the function itself, without a graph"
            )

    return CUDAGraph


def data_with_device(original: Any) -> Any:
    """`FakeTensor.data`, whose setter would not copy the device: it sets that too."""

    def put(self: Any, value: Any) -> None:
        original.__set__(self, value)
        self.fake_device = value.fake_device

    return property(original.__get__, put)


def device_of_part(original: Any) -> Any:
    """`DTensor.device`, which would ask C++: the device of this rank's part."""
    return property(lambda self: self._local_tensor.device)


def compiling_nothing(original: Any) -> Any:
    """`torch.compile`: the function or module itself."""

    def stand_in(model: Any = None, **options: Any) -> Any:
        current().uncompiled = True
        return model if model is not None else (lambda function: function)

    return stand_in


def is_cuda(original: Any) -> Any:
    """`FakeTensor.is_cuda`, which would ask C++: by the device that Python sees."""
    return property(lambda self: self.fake_device.type == "cuda")


def is_cpu(original: Any) -> Any:
    """`FakeTensor.is_cpu`, as `is_cuda`."""
    return property(lambda self: self.fake_device.type == "cpu")


def foreach_types(original: list[type]) -> list[type]:
    """The classes of parameters for which an optimizer takes its operators on lists: fake ones too."""
    from torch._subclasses.fake_tensor import FakeTensor

    return [*original, FakeTensor]


def context_of_no_device(device: torch.device) -> None:
    """Initialise nothing."""


_CUDA = {
    **dict.fromkeys(("is_available", "is_initialized"), is_available),
    **dict.fromkeys(("_lazy_init", "init", "ipc_collect", "seed"), _lazy_init),
    **dict.fromkeys(("manual_seed", "manual_seed_all"), manual_seed),
    "device_count": device_count,
    "current_device": current_device,
    "set_device": set_device,
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
    "memory_summary": memory_summary,
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
    "memory_stats": memory_stats,
    "reset_peak_memory_stats": reset_peak_of,
    "empty_cache": empty_cache,
    "get_memory_info": get_memory_info,
}
"""Stand-ins in `torch.accelerator`."""

_FAKE = "torch._subclasses.fake_tensor"
_PROPERTY = "it is a property"

CUDA_SHIMS = (
    *(
        Patch(owner, name, STAND_IN, TORCH, _by(stand_in), optional=True)
        for owner, stand_ins in (
            ("torch.cuda", {**_CUDA, **_MEMORY}),
            ("torch.cuda.memory", {**_MEMORY, "_snapshot": _snapshot}),
            ("torch.accelerator", _ACCELERATOR),
        )
        for name, stand_in in stand_ins.items()
    ),
    Patch("torch.cuda.memory", "_record_memory_history", NO_CARD, TORCH, _by(_record_memory_history)),
    Patch("torch.cuda", "Stream", NO_CARD, TORCH, _by(Stream), unchecked="it is a class with other options"),
    Patch("torch.cuda", "Event", NO_CARD, TORCH, _by(Event), unchecked="it is a class with other options"),
    Patch(
        "torch.cuda",
        "CUDAGraph",
        "a captured graph has memory of its own",
        TORCH,
        graph_class,
        unchecked=BUILTIN,
    ),
    Patch("torch", "compile", "a compiler would trace fake tensors", TORCH, compiling_nothing),
    Patch("torch", "Generator", NO_CARD, TORCH, generator_class, unchecked=BUILTIN),
    Patch("torch.Tensor", "record_stream", NO_CARD, TORCH, _by(record_stream), unchecked=BUILTIN),
    Patch(
        f"{_FAKE}.FakeTensor",
        "is_cuda",
        "C++ has another name for the card",
        TORCH,
        is_cuda,
        unchecked=_PROPERTY,
    ),
    Patch(
        f"{_FAKE}.FakeTensor",
        "is_cpu",
        "C++ has another name for the card",
        TORCH,
        is_cpu,
        unchecked=_PROPERTY,
    ),
    Patch(f"{_FAKE}.FakeTensor", "data", "it keeps its device", TORCH, data_with_device, unchecked=_PROPERTY),
    Patch(
        "torch", "clear_autocast_cache", "the card has casts of its own", TORCH, clearing, unchecked=BUILTIN
    ),
    Patch(
        "torch.distributed.tensor.DTensor",
        "device",
        "C++ has another name for the card",
        TORCH,
        device_of_part,
        unchecked=_PROPERTY,
    ),
    Patch(
        _FAKE,
        "init_gpu_context",
        "it would use a GPU that is there",
        TORCH,
        _by(context_of_no_device),
        unchecked="it keeps its results, which hides its arguments",
    ),
    Patch(
        "torch.optim.optimizer",
        "_foreach_supported_types",
        "on a GPU an optimizer takes all parameters at once, and fake ones are of another class",
        TORCH,
        foreach_types,
        unchecked=DATA,
    ),
)
"""What is replaced while a card is rehearsed."""
