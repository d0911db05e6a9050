"""Stand-ins for the world that a rehearsal lacks: other ranks, memory and a GPU."""

from typing import Any

import torch

from harness.rehearsal.zero_shims import Original

GPU = torch.device("cpu", 0)
"""The fake GPU; the host is `torch.device("cpu")`, without an index.

A fake "cuda" device cannot have gradients where torch has no CUDA. This device uses the CPU's attention kernel, which
saves the same tensors as the GPU's: q, k, v, out and log-sum-exp.
"""


def assume_equal_lengths(original: Original) -> Original:
    """ZeRO-3's check that a list is as long on every rank: it sends its tensor, and assumes that the others agree."""

    def stand_in(lst: list[int]) -> None:
        _broadcast(len(lst))

    return stand_in


def assume_equal_lists(original: Original) -> Original:
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


def receive_hidden_states(original: Original) -> Original:
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


def unlimited_memory(original: Original) -> Original:
    """The accelerator's `available_memory`: always plenty, because this machine's memory is not that of the run."""

    def stand_in(self: Any, device_index: Any = None) -> int:
        return 2**62

    return stand_in


def is_adamw(original: Original) -> Original:
    """`is_zero_supported_optimizer`: only torch's own AdamW, the optimizer that runs use."""

    def stand_in(optimizer: Any) -> bool:
        return isinstance(optimizer, torch.optim.AdamW)

    return stand_in


def device_name(original: Original) -> Original:
    """The accelerator's name for a device: the fake GPU's."""

    def stand_in(self: Any, device_index: Any = None) -> str:
        return str(GPU)

    return stand_in


def current_device_name(original: Original) -> Original:
    """The accelerator's name for the current device: the fake GPU's."""

    def stand_in(self: Any) -> str:
        return str(GPU)

    return stand_in


def on_accelerator(original: Original) -> Original:
    """The accelerator's `on_accelerator`: true only for tensors on the fake GPU."""

    def stand_in(self: Any, tensor: torch.Tensor) -> bool:
        return tensor.device == GPU

    return stand_in


def tensor_on_device(original: Original) -> Original:
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


class Stream:
    """A stand-in for the stream in which an offloaded cache copies layers: here everything runs in order."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once: earlier work is already done."""

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: Any) -> None:
        """Restore nothing."""


def stream_class(original: Original) -> Original:
    """`torch.Stream`: the class of the stand-in."""
    return Stream


def default_stream(original: Original) -> Original:
    """`torch.cuda.default_stream`: a stand-in."""

    def stand_in(device: Any = None) -> Stream:
        return Stream()

    return stand_in


def cleared(original: Any) -> Any:
    """A global of this process's world: an empty dict, or None."""
    return {} if isinstance(original, dict) else None


def no_backend(original: Any) -> None:
    """DeepSpeed's communication backend: none yet."""


def new_accelerator(original: Any) -> Any:
    """DeepSpeed's accelerator: the CPU's."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    return CPU_Accelerator()


def original_linear(original: Original) -> Original:
    """`torch.nn.functional.linear`: torch's own, whatever ran before."""
    return torch._C._nn.linear
