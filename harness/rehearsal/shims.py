"""Shims: functions in torch, transformers and DeepSpeed that a fake world must replace. All are restored afterwards.

Checked with torch 2.11 and 2.13 and DeepSpeed 0.19.8. Another release may change the original of a shim. If the
original is gone or takes other arguments, the error names the shim; if the bytes change, the equality tests fail.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch._guards import detect_fake_mode

from harness.rehearsal import zero_shims
from harness.rehearsal.zero_shims import Original


class Shim(NamedTuple):
    """`attribute` of `owner` (a module or a class) is replaced by the result of `stand_in(original)`.

    The replacement takes the same arguments as the original.
    """

    owner: str
    attribute: str
    reason: str
    stand_in: Callable[[Original], Original]


def in_place(original: Original) -> Original:
    """`Module._apply` that sets `.data`, as torch's own does for real parameters."""

    def stand_in(self: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)
        with torch.no_grad():
            for parameter in self._parameters.values():
                if parameter is not None:
                    parameter.data = fn(parameter)
                    if parameter.grad is not None:
                        parameter.grad.data = fn(parameter.grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    return stand_in


def with_values(original: Original) -> Original:
    """transformers' `is_fake_tensor`: always false, because the values of masks are known (`known_values.py`)."""

    def stand_in(x: Any) -> bool:
        return False

    return stand_in


def same_length(original: Original) -> Original:
    """ZeRO-3's check that a list is as long on every rank: it sends its tensor, and assumes that the others agree."""

    def stand_in(lst: list[int]) -> None:
        _broadcast(len(lst))

    return stand_in


def same_list(original: Original) -> Original:
    """ZeRO-3's `get_lst_from_rank0`: it sends its tensor, and assumes that rank 0 has the same list."""

    def stand_in(lst: list[int]) -> list[int]:
        _broadcast(lst)
        return lst

    return stand_in


def _broadcast(numbers: int | list[int]) -> None:
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    device = str(get_accelerator().current_device_name())
    comm.broadcast(torch.tensor(numbers, dtype=torch.int64, device=device), src=0)


def received(original: Original) -> Original:
    """The pipeline engine's `_recv_tensor_meta`: the buffer it returns is for hidden states, which all stages send."""

    def stand_in(self: Any, send_stage: int) -> torch.Tensor:
        from deepspeed.runtime.pipe import p2p
        from deepspeed.runtime.pipe.engine import TENSOR_META_SIZE

        meta = torch.empty(TENSOR_META_SIZE, dtype=torch.int32, device=self.device)
        p2p.recv(meta, send_stage)
        stage = self.module.forward_funcs[0]
        buffer: torch.Tensor = self._allocate_or_extend_buffers(
            0, stage.receives, next(stage.parameters()).dtype
        )
        return buffer

    return stand_in


def valid(original: Original) -> Original:
    """`torch._is_all_true`, with which distributions check their parameters: always true, as values are unknown."""

    def stand_in(input: torch.Tensor) -> bool:
        original(input)
        return True

    return stand_in


def fake_state(original: Original) -> Original:
    """`torch.get_rng_state`, whose tensor comes from no operator: it returns a fake one."""

    def stand_in() -> torch.Tensor:
        mode = detect_fake_mode()
        assert mode is not None
        return mode.from_tensor(original())

    return stand_in


def no_state(original: Original) -> Original:
    """`torch.set_rng_state`: it does nothing, because random numbers have no values here."""

    def stand_in(new_state: torch.Tensor) -> None:
        pass

    return stand_in


def plenty(original: Original) -> Original:
    """The accelerator's `available_memory`: always plenty, because this machine's memory is not that of the run."""

    def stand_in(self: Any, device_index: Any = None) -> int:
        return 2**62

    return stand_in


def supported(original: Original) -> Original:
    """`is_zero_supported_optimizer`: only torch's own AdamW, the optimizer that runs use."""

    def stand_in(optimizer: Any) -> bool:
        return isinstance(optimizer, torch.optim.AdamW)

    return stand_in


GPU = torch.device("cpu", 0)
"""The fake GPU; the host is `torch.device("cpu")`, without an index.

A fake "cuda" device cannot have gradients where torch has no CUDA. This device uses the CPU's attention kernel, which
saves the same tensors as the GPU's: q, k, v, out and log-sum-exp.
"""


def on_gpu(original: Original) -> Original:
    """The accelerator's name for a device: the fake GPU's."""

    def stand_in(self: Any, device_index: Any = None) -> str:
        return str(GPU)

    return stand_in


def on_current_gpu(original: Original) -> Original:
    """The accelerator's name for the current device: the fake GPU's."""

    def stand_in(self: Any) -> str:
        return str(GPU)

    return stand_in


def is_on_gpu(original: Original) -> Original:
    """The accelerator's `on_accelerator`: true only for tensors on the fake GPU."""

    def stand_in(self: Any, tensor: torch.Tensor) -> bool:
        return tensor.device == GPU

    return stand_in


def moved(original: Original) -> Original:
    """`torch.tensor`, which would leave the new tensor on the host: it moves it to `device`."""

    def stand_in(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        tensor: torch.Tensor = original(data, **options)
        return tensor if device is None else tensor.to(device)

    return stand_in


def data_with_device(original: Any) -> Any:
    """`FakeTensor.data`, whose setter would not copy the device: it sets that too."""

    def put(self: Any, value: Any) -> None:
        original.__set__(self, value)
        self.fake_device = value.fake_device

    return property(original.__get__, put)


def packed(original: Original) -> Original:
    """A quantized layer's `_quantize`, which packs only tensors of torch's own class: it packs fake tensors too."""

    def stand_in(self: Any, tensor: torch.Tensor, axis: int) -> Any:
        from optimum.quanto.tensor.packed import PackedTensor

        quantized = original(self, tensor, axis)
        if not isinstance(quantized._data, PackedTensor):
            quantized._data = PackedTensor.pack(quantized._data, self.nbits)
        return quantized

    return stand_in


def grouped(original: Original) -> Original:
    """`_meta_grouped_mm_common`, the shape function of a grouped matrix product: it accepts fp32, as the kernels do."""

    def stand_in(
        mat_a: Any,
        mat_b: Any,
        scale_a: Any,
        scale_b: Any,
        offs: Any = None,
        bias: Any = None,
        scale_result: Any = None,
        out_dtype: Any = None,
        use_fast_accum: bool = False,
    ) -> Any:
        if scale_a is None and mat_a.dtype == mat_b.dtype == torch.float32:
            return import_module("torch._meta_registrations")._create_grouped_mm_output_tensor(
                mat_a, mat_b, offs, out_dtype
            )
        options = bias, scale_result, out_dtype, use_fast_accum
        return original(mat_a, mat_b, scale_a, scale_b, offs, *options)

    return stand_in


class Stream:
    """A stand-in for the stream in which an offloaded cache copies layers: here everything runs in order."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once: earlier work is already done."""

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: Any) -> None:
        """Restore nothing."""


def streams(original: Original) -> Original:
    """`torch.Stream`: the class of the stand-in."""
    return Stream


def no_streams(original: Original) -> Original:
    """`torch.cuda.default_stream`: a stand-in."""

    def stand_in(device: Any = None) -> Stream:
        return Stream()

    return stand_in


ACCELERATOR = "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator"
ZERO12 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
ZERO3 = "deepspeed.runtime.zero"
NOT_FAKE = "a real tensor becomes a second, fake one where an operator takes it"
ALONE = "there is no rank 0 to ask"
ONCE_A_RANK = "it works once for every rank, and its time would grow with the world"

SHIMS = (
    Shim(
        "torch.nn.Module",
        "_apply",
        "torch swaps fake parameters, which fails where anything refers to them weakly",
        in_place,
    ),
    Shim(
        "transformers.utils.import_utils",
        "is_fake_tensor",
        "transformers takes another branch where it takes values to be unknown",
        with_values,
    ),
    Shim(
        "transformers.cache_utils.QuantoQuantizedLayer",
        "_quantize",
        "optimum-quanto packs no fake tensor",
        packed,
    ),
    Shim(
        "torch._meta_registrations",
        "_meta_grouped_mm_common",
        "it takes grouped products of fp32, which run, to be impossible",
        grouped,
    ),
    Shim("torch", "_is_all_true", "what is drawn from has no values that could be valid", valid),
    Shim("torch", "get_rng_state", NOT_FAKE, fake_state),
    Shim("torch", "set_rng_state", NOT_FAKE, no_state),
    Shim(
        ACCELERATOR,
        "available_memory",
        "ZeRO-1 and 2 take another way where this machine has little memory free",
        plenty,
    ),
    Shim(f"{ZERO3}.utils", "assert_lst_len_same_as_other_ranks", ALONE, same_length),
    Shim(
        "deepspeed.runtime.engine",
        "is_zero_supported_optimizer",
        "it imports a compiler to know another optimizer by, which takes a second",
        supported,
    ),
    Shim(f"{ZERO3}.utils", "get_lst_from_rank0", ALONE, same_list),
    Shim(f"{ZERO3}.stage3", "reduce_scatter_coalesced", ONCE_A_RANK, zero_shims.reduce_scattered),
    Shim(f"{ZERO3}.partition_parameters.AllGatherCoalescedHandle", "wait", ONCE_A_RANK, zero_shims.gathered),
    Shim(ZERO12, "average_tensor", ONCE_A_RANK, zero_shims.averaged),
    Shim(ZERO12, "allreduce_and_copy_with_multiple_ranks", ONCE_A_RANK, zero_shims.sent),
    Shim(ZERO12, "initialize_gradient_partitioning_data_structures", ONCE_A_RANK, zero_shims.booked),
    Shim(ZERO12, "initialize_gradient_partition", ONCE_A_RANK, zero_shims.placed),
    Shim(ZERO12, "get_first_param_index", ONCE_A_RANK, zero_shims.first_index),
    Shim(
        "deepspeed.runtime.pipe.engine.PipelineEngine",
        "_recv_tensor_meta",
        "there is no stage before it that would say what it sends",
        received,
    ),
    Shim("torch.Tensor", "narrow", ONCE_A_RANK, zero_shims.narrow),
)


TWO_DEVICES = "there is a GPU beside the host, which DeepSpeed takes for its accelerator"

GPU_SHIMS = (
    Shim(ACCELERATOR, "device_name", TWO_DEVICES, on_gpu),
    Shim(ACCELERATOR, "current_device_name", TWO_DEVICES, on_current_gpu),
    Shim(ACCELERATOR, "on_accelerator", TWO_DEVICES, is_on_gpu),
    Shim("torch", "tensor", TWO_DEVICES, moved),
    Shim("torch", "Stream", "there is no GPU that would have one", streams),
    Shim("torch.cuda", "default_stream", "there is no GPU that would have one", no_streams),
    Shim("torch._subclasses.fake_tensor.FakeTensor", "data", TWO_DEVICES, data_with_device),
)


@contextmanager
def shimmed(gpu: bool = False) -> Iterator[None]:
    """Install every shim in this context; with `gpu` also those for a GPU.

    Raises RuntimeError with the name of a shim that does not fit.
    """
    with ExitStack() as undo:
        for shim in (*SHIMS, *(GPU_SHIMS if gpu else ())):
            owner = _find(shim.owner)
            original = getattr(owner, shim.attribute, None)
            replacement = shim.stand_in(original)
            _check(shim, original, replacement)
            own_attribute = vars(owner).get(shim.attribute)
            undo.callback(_put_back, owner, shim.attribute, own_attribute)
            setattr(owner, shim.attribute, replacement)
        yield


def _put_back(owner: Any, attribute: str, own_attribute: Any) -> None:
    """Restore an attribute. An inherited one is deleted, so that the parent's is visible again."""
    if own_attribute is None:
        delattr(owner, attribute)
    else:
        setattr(owner, attribute, own_attribute)


def _find(path: str) -> Any:
    """The module or class at `path`."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name, None)


def _check(shim: Shim, original: Any, replacement: Original) -> None:
    """Raise RuntimeError where the original is gone or takes other arguments. Builtins, classes and descriptors are
    not checked: they have no usable signature."""
    if (
        inspect.isbuiltin(original)
        or inspect.isclass(original)
        or inspect.ismethoddescriptor(original)
        or inspect.isdatadescriptor(original)
    ):
        return
    actual = None if original is None else tuple(inspect.signature(_undecorated(original)).parameters)
    wanted = tuple(inspect.signature(replacement).parameters)
    if actual != wanted:
        package = shim.owner.partition(".")[0]
        problem = "it is not there" if actual is None else f"it takes {actual}, not {wanted}"
        raise RuntimeError(
            f"a rehearsal replaces {shim.owner}.{shim.attribute}, for {shim.reason}; "
            f"in {package} {version(package)} {problem}"
        )


def _undecorated(function: Any) -> Any:
    """The function inside DeepSpeed's tracing decorator, whose own signature accepts anything."""
    contents = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return next((each for each in contents if inspect.isfunction(each)), function)
