"""A batch: prompts that are continued together, padded on the left, so that all end together.

B sequences, P columns of prompts, N of new tokens. Every buffer is made once, before the first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 0
"""The id in padded places. It is masked: any id in the vocabulary would do."""

LOOK_EVERY = 16
"""Tokens between looks at whether every sequence has ended, where the host must wait to look."""


@dataclass(frozen=True)
class Requests:
    """Prompts that are continued together (ids, none empty), each by up to its own `most` >= 1 new tokens.

    `numbers` are theirs in the whole run, which decide what is drawn for them.
    """

    prompts: Sequence[Sequence[int]]
    most: Sequence[int]
    numbers: Sequence[int] = ()

    @property
    def width(self) -> int:
        """P: columns for the longest prompt."""
        return max(map(len, self.prompts))

    @property
    def room(self) -> int:
        """N: columns for the most new tokens of any."""
        return max(self.most)

    @property
    def shown(self) -> int:
        """Columns that a model is shown in all: the last token is nobody's past."""
        return self.width + self.room - 1

    @property
    def furthest(self) -> int:
        """Tokens of the longest sequence; fewer than columns where the longest prompt has not the most after it."""
        return max(len(prompt) + most for prompt, most in zip(self.prompts, self.most, strict=True))


@dataclass(frozen=True)
class Batch:
    """Prompts, the room for what follows them, and what the model must know to ignore their padding."""

    tokens: Tensor  # [B, P + N] int64
    mask: Tensor | None  # [B, P + N] int64, 0 on padding; None where nothing is padded
    positions: Tensor  # [B, P + N] int64, counted from each prompt's first token
    ended: Tensor  # [B] bool
    most: (
        Tensor | None
    )  # [B] int64, new tokens of each; None where none may end before the others, or all are alike
    eos: Tensor  # [E] int64, empty where nothing ends a sequence
    width: int  # P

    def write(self, token: Tensor, column: int) -> None:
        """Put `token` [B] into `column`. What follows a sequence's end is cut off when all is done."""
        self.tokens[:, column] = token
        if len(self.eos):
            self.ended.logical_or_(torch.isin(token, self.eos))
        if self.most is not None:
            self.ended.logical_or_(self.most <= column + 1 - self.width)

    def done(self, column: int) -> bool:
        """Whether every sequence has ended before `column`; asked rarely where the answer is a wait."""
        rarely = self.ended.device.type != "cpu" and (column - self.width) % LOOK_EVERY
        return bool(len(self.eos)) and not rarely and bool(self.ended.all())


def pad_left(requests: Requests, eos: Sequence[int], device: torch.device) -> Batch:
    """`requests` as one batch with room for the most new tokens of any, each ending after any of `eos`.

    What follows a sequence's own end is at positions that some other has: a model may have none beyond them.
    """
    prompts, width = requests.prompts, requests.width
    apart = requests.most if eos and len(set(requests.most)) > 1 else []
    tokens = torch.full((len(prompts), width + requests.room), PADDING)
    mask = torch.ones_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) : width] = torch.tensor(prompt)
        mask[row, : width - len(prompt)] = 0
    positions = (mask.cumsum(dim=-1) - 1).clamp_(min=0, max=requests.furthest - 1)
    padded = any(len(prompt) < width for prompt in prompts)
    return Batch(
        tokens.to(device),
        mask.to(device) if padded else None,
        positions.to(device),
        torch.zeros(len(prompts), dtype=torch.bool, device=device),
        torch.tensor(apart, dtype=torch.int64, device=device) if apart else None,
        torch.tensor(eos, dtype=torch.int64, device=device),
        width,
    )
