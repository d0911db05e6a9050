"""One call of an ATen operator on a card, as the rules of `operators.py` read it."""

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

THREADS_PER_MULTIPROCESSOR = {7.0: 2048, 7.5: 1024, 8.0: 2048, 9.0: 2048, 10.0: 2048, 10.3: 2048}
"""cudaDeviceProp.maxThreadsPerMultiProcessor by compute capability, from the CUDA programming guide's table."""


class Card(NamedTuple):
    """What the kernels of PyTorch ask of a card before they allocate.

    capability: compute capability, as 8.9.
    multiprocessors: cudaDeviceProp.multiProcessorCount; None where it is unknown, and so are rules that depend on it.
    cudnn: the version that torch was given, as 91501 for 9.15.1; wheels with CUDA 13 have this one or a later one,
        wheels with CUDA 12 an earlier one (pytorch#169849).
    """

    capability: float
    multiprocessors: int | None = None
    cudnn: int = 91501

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor of the compute capability."""
        major, minor = divmod(round(self.capability * 10), 10)
        return major, minor

    @property
    def threads_per_multiprocessor(self) -> int:
        return THREADS_PER_MULTIPROCESSOR.get(self.capability, 1536)


class Moment(NamedTuple):
    """The temporary blocks alive at once inside an operator.

    blocks: bytes as the kernel requests them; the allocator rounds each.
    outputs: whether the operator's outputs are allocated by then.
    """

    blocks: tuple[int, ...] = ()
    outputs: bool = True


Moments = tuple[Moment, ...] | None
"""Candidates for the moment at which most is alive; none where there is no scratch, None where it is unknown."""


@cache
def _parameters(func: OpOverload) -> tuple[tuple[str, Any], ...]:
    return tuple((each.name, each.default_value) for each in func._schema.arguments)


class Call:
    """An operator's arguments by the names of its schema, with what it returned."""

    def __init__(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, card: Card
    ) -> None:
        self.card = card
        self.out = out
        parameters = _parameters(func)
        self._given = dict(parameters) | dict(zip((name for name, _ in parameters), args, strict=False))
        self._given.update(kwargs)

    def __getitem__(self, name: str) -> Any:
        return self._given[name]

    def get(self, name: str) -> Any:
        """The argument of this name; None where the schema has none."""
        return self._given.get(name)

    @property
    def outs(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the operator returned."""
        each = self.out if isinstance(self.out, (tuple, list)) else (self.out,)
        return tuple(one for one in each if isinstance(one, torch.Tensor))


def nbytes(tensor: torch.Tensor) -> int:
    """What a dense copy of a tensor takes, in bytes."""
    return tensor.numel() * tensor.element_size()


def copies(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """The blocks that `contiguous()` allocates: one for each tensor that is not contiguous yet."""
    return tuple(nbytes(each) for each in tensors if each is not None and not each.is_contiguous())


def accumulated(dtype: torch.dtype) -> int:
    """Bytes of the type that CUDA kernels accumulate a type in: ATen/AccumulateType.h."""
    return {torch.float16: 4, torch.bfloat16: 4, torch.float32: 4}.get(dtype, 8)


def once(*blocks: int) -> Moments:
    """One moment, with the outputs allocated; no moment where no block has a size."""
    sized = tuple(each for each in blocks if each)
    return (Moment(sized),) if sized else ()


def up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def rows(tensor: torch.Tensor, dim: int) -> int:
    """How many slices along `dim` a tensor has."""
    return prod(size for at, size in enumerate(tensor.shape) if at != dim % max(tensor.dim(), 1))
