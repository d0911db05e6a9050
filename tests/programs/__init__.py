"""Toy programs as anybody writes them, and whether two runs of one gave the same."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from harness import Ledger

Program = Callable[[Ledger], Any]
"""What it makes, with owners told to a ledger, which may be off."""

PROGRAMS: dict[str, Program] = {}
"""All of them by name, once their modules are imported."""


def program(result: Program) -> Program:
    """Add it to them."""
    PROGRAMS[result.__name__] = result
    return result


def mlp() -> nn.Sequential:
    """Four layers of 740 parameters, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))


def data(rows: int = 8, seed: int = 0) -> Tensor:
    """[rows, 16], the same for a seed."""
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def squared(result: Tensor) -> Tensor:
    """A loss."""
    return result.pow(2).mean()


def train(
    ledger: Ledger,
    model: nn.Module,
    forward: Callable[[Tensor], Tensor] | None = None,
    optimizer: Any = None,
    *,
    rows: Sequence[int] = (8, 8, 8),
    loss: Callable[[Tensor], Tensor] = squared,
    step: Callable[[], Any] | None = None,
) -> list[Tensor]:
    """The loss of each step, and then the parameters."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    ledger.own(model=model, optimizer=optimizer)
    losses = []
    for seed, count in enumerate(rows):
        lost = loss((model if forward is None else forward)(data(count, seed)))
        lost.backward()
        (optimizer.step if step is None else step)()
        optimizer.zero_grad()
        losses.append(lost.detach())
    return [*losses, *(parameter.detach().clone() for parameter in model.parameters())]


def gradients(model: nn.Module) -> list[Tensor | None]:
    """Of each parameter."""
    return [parameter.grad for parameter in model.parameters()]


def alike(one: Any, other: Any) -> bool:
    """Whether both came to the same, bit for bit, but that a NaN is a NaN."""
    ones, others = tree_leaves(one), tree_leaves(other)
    return len(ones) == len(others) and all(map(_alike, ones, others))


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
        return False
    with torch.no_grad():
        return bool(((one == other) | ((one != one) & (other != other))).all())
