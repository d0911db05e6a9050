"""What must be replaced in torch and DeepSpeed for a fake world, each with its reason. All of it is put back.

Checked with torch 2.11 and 2.13 and DeepSpeed 0.19.8. Another release may change what a shim stands for: one whose
place is gone, or takes other arguments, is named by the error; one that would change bytes fails the equality tests.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import torch


class Shim(NamedTuple):
    """`attribute` of `owner` (a module, or a class in one) is replaced by `stand_in`, which takes the same arguments."""

    owner: str
    attribute: str
    reason: str
    stand_in: Callable[..., Any]


def apply_to_module(self: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
    """Convert in place by `.data`, as real parameters are."""
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


def has_values(x: Any) -> bool:
    """Not what transformers takes for a fake tensor: masks and positions have values here (`values.py`)."""
    return False


def lengths_agree(lst: list[int]) -> None:
    """Send the length of `lst` in a tensor as the original's, and take the others to have the same."""
    _broadcast(torch.tensor(len(lst), dtype=torch.int64, device=_device()))


def lists_agree(lst: list[int]) -> list[int]:
    """Send `lst` in a tensor as the original's, and take the others to have the same."""
    _broadcast(torch.tensor(lst, dtype=torch.int64, device=_device()))
    return lst


def _broadcast(tensor: torch.Tensor) -> None:
    from deepspeed import comm

    comm.broadcast(tensor, src=0)


def _device() -> str:
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().current_device_name())


SHIMS = (
    Shim(
        "torch.nn.Module",
        "_apply",
        "torch swaps fake parameters instead of their data, which fails where anything refers to them weakly",
        apply_to_module,
    ),
    Shim(
        "transformers.utils.import_utils",
        "is_fake_tensor",
        "transformers takes another branch for a fake mask or positions, whose values it takes to be unknown",
        has_values,
    ),
    Shim(
        "deepspeed.runtime.zero.utils",
        "assert_lst_len_same_as_other_ranks",
        "ZeRO-3 asks rank 0 how long its list is, and there is no rank 0",
        lengths_agree,
    ),
    Shim(
        "deepspeed.runtime.zero.utils",
        "get_lst_from_rank0",
        "ZeRO-3 asks rank 0 for its list, and there is no rank 0",
        lists_agree,
    ),
)


@contextmanager
def shimmed() -> Iterator[None]:
    """Within it every shim is in place. Raises RuntimeError, naming it, where one does not fit."""
    before = []
    try:
        for shim in SHIMS:
            owner = _find(shim.owner)
            original = getattr(owner, shim.attribute, None)
            _check(shim, original)
            before.append((owner, shim.attribute, original))
            setattr(owner, shim.attribute, shim.stand_in)
        yield
    finally:
        for owner, attribute, original in reversed(before):
            setattr(owner, attribute, original)


def _find(path: str) -> Any:
    """A module, or a class in one."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name, None)


def _undecorated(function: Any) -> Any:
    """What DeepSpeed's tracing decorator, which takes anything, calls."""
    within = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return next((each for each in within if inspect.isfunction(each)), function)


def _check(shim: Shim, original: Any) -> None:
    taken = None if original is None else tuple(inspect.signature(_undecorated(original)).parameters)
    expected = tuple(inspect.signature(shim.stand_in).parameters)
    if taken != expected:
        package = shim.owner.partition(".")[0]
        found = "it is not there" if taken is None else f"it takes {taken}, not {expected}"
        raise RuntimeError(
            f"a rehearsal replaces {shim.owner}.{shim.attribute} ({shim.reason}), and in {package} {version(package)} {found}"
        )
