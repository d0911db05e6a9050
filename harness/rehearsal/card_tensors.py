"""Stand-ins for what a program does with tensors of the card, outside `torch.cuda`."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from harness.ledger.lines import calling_line
from harness.ledger.patch import BUILTIN, DATA, TORCH, Patch
from harness.rehearsal.card_autocast import clearing
from harness.rehearsal.card_memory import current
from harness.rehearsal.cuda_shims import NO_CARD, by, current_accelerator
from harness.rehearsal.known_values import NeedsValue

NO_VALUES = "a fake tensor has no values, and the error should say where they are needed"


def scatter(self: Any, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
    return (inputs,), (kwargs or {},)


def distributed_data_parallel(original: Any) -> Any:
    """`DistributedDataParallel.__init__`: it is refused."""

    def stand_in(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "DistributedDataParallel needs the other ranks: rehearse the model itself, whose gradients have the bytes "
            "of its buckets once more"
        )

    return stand_in


def loading_elsewhere(original: Any) -> Any:
    """The iterator of a `DataLoader` with workers: it is refused."""

    def stand_in(self: Any, loader: Any) -> None:
        raise RuntimeError(
            f"{calling_line()}: DataLoader(num_workers={loader.num_workers}): workers are other processes, where "
            "nothing is rehearsed; give num_workers=0 in a rehearsal"
        )

    return stand_in


def record_stream(self: torch.Tensor, stream: Any) -> None:
    current().record_stream(self.untyped_storage()._cdata, stream.stream_id)


def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    return self.clone()  # the host's memory, pinned or not


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


def formatted(original: Any) -> Any:
    """`FakeTensor.__format__`: that of its value, if it has one element."""

    def stand_in(self: torch.Tensor, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else original(self, spec)

    return stand_in


def refuses(name: str) -> Any:
    """A method of `FakeTensor` that needs values: it is refused by its line."""

    def stand_in(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NeedsValue(
            f"{calling_line()}: {name} of a tensor needs its values, and a rehearsal computes none"
        )

    return stand_in


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
    return [*original, FakeTensor]


def context_of_no_device(device: torch.device) -> None:
    """Initialise nothing."""


_FAKE = "torch._subclasses.fake_tensor"
_PROPERTY, _INHERITED = "it is a property", "it is inherited"

CARD_SHIMS = (
    Patch(
        "torch.utils.data.dataloader._MultiProcessingDataLoaderIter",
        "__init__",
        "another process computes real tensors, which no rehearsal sees",
        TORCH,
        loading_elsewhere,
    ),
    Patch("torch.nn.parallel.DataParallel", "scatter", "there is one card", TORCH, by(scatter)),
    Patch(
        "torch.nn.parallel.DistributedDataParallel",
        "__init__",
        "it would wait for ranks that are not there",
        TORCH,
        distributed_data_parallel,
    ),
    Patch(f"{_FAKE}.FakeTensor", "pin_memory", NO_CARD, TORCH, by(pin_memory), unchecked=_INHERITED),
    Patch(
        "torch.cuda",
        "CUDAGraph",
        "a captured graph has memory of its own",
        TORCH,
        graph_class,
        unchecked=BUILTIN,
    ),
    Patch(
        "torch._C",
        "_get_accelerator",
        NO_CARD,
        TORCH,
        by(current_accelerator),
        unchecked=BUILTIN,
        optional=True,
    ),
    Patch(f"{_FAKE}.FakeTensor", "__format__", NO_VALUES, TORCH, formatted, unchecked=_INHERITED),
    Patch(f"{_FAKE}.FakeTensor", "numpy", NO_VALUES, TORCH, by(refuses("numpy")), unchecked=_INHERITED),
    Patch(
        f"{_FAKE}.FakeTensor", "__reduce_ex__", NO_VALUES, TORCH, by(refuses("save")), unchecked=_INHERITED
    ),
    Patch("torch", "Generator", NO_CARD, TORCH, generator_class, unchecked=BUILTIN),
    Patch("torch.Tensor", "record_stream", NO_CARD, TORCH, by(record_stream), unchecked=BUILTIN),
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
        by(context_of_no_device),
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

COMPILE = Patch("torch", "compile", "a compiler would trace fake tensors", TORCH, compiling_nothing)
"""The engine's rehearsals need it not: what they would compile has a course of its own."""
