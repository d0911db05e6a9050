"""Stand-ins for the world that a rehearsal lacks: other ranks, memory and a GPU."""

from typing import Any
from weakref import WeakKeyDictionary

import torch

from harness.rehearsal.card import CARD
from harness.rehearsal.zero_shims import Original


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


def kept_by_its_work(original: Original) -> Original:
    """A method of a process group: its tensors live as long as the `Work` that it returns, as gloo's do.

    NCCL's keeps what it fills alone, and fills a list by way of one flat tensor, which is not modelled.
    """

    def stand_in(group: Any, *args: Any, **kwargs: Any) -> Any:
        work = original(group, *args, **kwargs)
        if work is not None:
            _TENSORS[work] = args, kwargs
        return work

    # a subclass of ProcessGroup calls what has another name once more, as if it were its own
    stand_in.__code__ = stand_in.__code__.replace(co_name=original.__name__)
    return stand_in


_TENSORS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The arguments of each collective, by its work."""


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


def turned_off(original: Any) -> bool:
    """A switch, off."""
    return False


def is_not_available(original: Original) -> Original:
    """Whether a package is there: it is not."""

    def stand_in() -> bool:
        return False

    return stand_in


def device_name(original: Original) -> Original:
    """The accelerator's name for a device: the fake GPU's."""

    def stand_in(self: Any, device_index: Any = None) -> str:
        return str(CARD)

    return stand_in


def current_device_name(original: Original) -> Original:
    """The accelerator's name for the current device: the fake GPU's."""

    def stand_in(self: Any) -> str:
        return str(CARD)

    return stand_in


def on_accelerator(original: Original) -> Original:
    """The accelerator's `on_accelerator`: true only for tensors on the fake GPU."""

    def stand_in(self: Any, tensor: torch.Tensor) -> bool:
        return tensor.device == CARD

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
