"""Computes the real values of small integer and boolean tensors beside their fake tensors.

A fake tensor has a shape but no value. Models and engines still read values: is this mask all ones, do these positions
start again from 0? The value decides which branch runs, and so the bytes. Positions, masks and counters follow from
shapes alone, so they are computed. Values that depend on weights are unknown; reading one gives a value of `UNKNOWN`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from harness.ledger.lines import PASSED_OVER, calling_line
from harness.ledger.tensors import tensors_in

LARGEST = 2**20
"""The most elements of a tensor that is computed. [B, T] masks are far smaller; nobody reads values of [T, T] ones."""

UNKNOWN: dict[bool, Any] = {True: 1.0, False: 0}
"""The value of an unknown number (a loss, a norm, a sampled token), by whether its dtype is floating point."""

READ_BY_TORCH = {
    "utils/data": 0.0,  # the seed of a loader's workers
    "optim": 0.5,  # a number of steps, or a product of momenta, which only scale
    "nn/init.py": 1.0,  # a sign
    "amp/grad_scaler.py": 0.0,  # no gradient has overflowed
    "nn/utils/clip_grad.py": 0.0,  # no norm is infinite
}
"""Where torch itself reads a value that changes no shape, by a prefix of the file, and what it is taken to be."""

REMEDY = (
    "and a rehearsal computes none: leave that out of what is rehearsed, or say what to take for every unknown value, "
    "as assume=1.0 where the rehearsal's hardware is"
)

_PERMUTES = (torch.ops.aten.randperm.default, torch.ops.aten.randperm.generator)
"""Operators that order at random, as a loader's sampler does: here they keep the order."""


class NeedsValue(RuntimeError):
    """The program reads a value of a fake tensor that is not known."""


class KnownValues:
    """The values of fake tensors, as real tensors on the host, and what a program gets that reads one.

    A value that is not known is `assumed`; without that it is 0 or 1, or with `strict` refused by NeedsValue.
    """

    def __init__(self, assumed: float | None = None, strict: bool = False) -> None:
        self._assumed, self._strict = assumed, strict
        self._known: Any = WeakIdKeyDictionary()  # from a fake tensor to a real one with its values

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The real tensor with the values of `tensor`; None where they are unknown."""
        real: torch.Tensor | None = self._known.get(tensor) if isinstance(tensor, FakeTensor) else tensor
        return real

    def item(self, tensor: torch.Tensor) -> Any:
        """The value of `tensor`, of one element. Raises NeedsValue."""
        real = self.value(tensor)
        if real is not None:
            with no_dispatch():
                return real.item()
        value = None if tensor.dtype == torch.bool and _within("optim") else _read_by_torch()
        value = self._assumed if value is None else value
        if value is not None:
            with no_dispatch():
                return torch.tensor(value, dtype=tensor.dtype).item()
        if self._strict:
            raise NeedsValue(f"{calling_line()}: a value of a tensor is read, {REMEDY}")
        return False if tensor.dtype == torch.bool else UNKNOWN[tensor.dtype.is_floating_point]

    def equal(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        """Whether both are equal; where a value is unknown, whether their shapes are."""
        one, other = self.value(left), self.value(right)
        if one is None or other is None:
            return left.shape == right.shape
        with no_dispatch():
            return torch.equal(one, other)

    def learn(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note what follows from `func`, which returned `out`: its values, or that those it wrote are unknown now."""
        if not self._compute(func, args, kwargs, out) and func._schema.is_mutable:
            self.forget(written(func, args, kwargs))

    def _compute(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Run `func` on real values if the inputs are known and the outputs worth knowing. Returns whether it ran."""
        if func in _PERMUTES and out.numel() <= LARGEST:
            with no_dispatch():
                self._known[out] = torch.arange(out.numel(), dtype=out.dtype)
            return True
        outputs = (
            [out] if isinstance(out, torch.Tensor) else list(out) if isinstance(out, (tuple, list)) else []
        )
        if not outputs or not all(isinstance(each, FakeTensor) and _worth_knowing(each) for each in outputs):
            return False
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        computed = self._computed(func, args, kwargs)
        if computed is None:
            return False
        self._known.update(zip(outputs, tensors_in(computed), strict=True))
        return True

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of `func` for the real values of its arguments, on the host. None where one is unknown."""
        kwargs = (
            {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs
        )  # no GPU, none pinned
        leaves, spec = tree_flatten((args, kwargs))
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.device):
                leaves[index] = torch.device("cpu")
            elif isinstance(leaf, torch.Tensor):
                leaves[index] = self.value(leaf)
                if leaves[index] is None or leaf.numel() > LARGEST:
                    return None
        real_args, real_kwargs = tree_unflatten(leaves, spec)
        with no_dispatch():
            return func(*real_args, **real_kwargs)

    def with_known_shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator whose shape depends on values. Raises NeedsValue where these are not known."""
        real = self._computed(func, args, kwargs)
        if real is None:
            raise NeedsValue(
                f"{calling_line()}: the shape of the result of {func.__name__.partition('.')[0]} depends on values, "
                "and a rehearsal computes none: leave that out of what is rehearsed"
            )
        device = next(tensors_in([*args, *kwargs.values()])).device
        computed, spec = tree_flatten(real)
        fakes = [
            torch.empty_like(each, device=device) if isinstance(each, torch.Tensor) else each
            for each in computed
        ]
        for fake, real in zip(fakes, computed, strict=True):
            if isinstance(fake, FakeTensor) and _worth_knowing(fake):
                self._known[fake] = real
        return tree_unflatten(fakes, spec)

    def forget(self, tensors: Any) -> None:
        """Mark `tensors`, and all tensors that share their storage, as unknown."""
        for tensor in tensors_in([*tensors]):
            real = self._known.get(tensor)
            if real is not None:
                storage = real.untyped_storage()._cdata
                for fake, other in list(self._known.items()):
                    if other.untyped_storage()._cdata == storage:
                        del self._known[fake]


def _within(prefix: str) -> bool:
    """Whether torch's code in files with this prefix runs now, for a caller outside torch."""
    return any(name.startswith(prefix) for name in _torch_files())


def _read_by_torch() -> float | None:
    """What a value is taken to be that one of `READ_BY_TORCH` reads now. None if none does."""
    values = (
        value for name in _torch_files() for prefix, value in READ_BY_TORCH.items() if name.startswith(prefix)
    )
    return next(values, None)


def _torch_files() -> Iterator[str]:
    """The files of torch whose code runs now for a caller outside torch, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    folder = f"{Path(torch.__file__).parent}/"
    while frame is not None and frame.f_code.co_filename.startswith(PASSED_OVER):
        yield frame.f_code.co_filename.removeprefix(folder)
        frame = frame.f_back


def _worth_knowing(tensor: torch.Tensor) -> bool:
    return not tensor.dtype.is_floating_point and tensor.numel() <= LARGEST


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments that `func` writes to, by its schema."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[index] if index < len(args) else kwargs.get(argument.name)
