"""A static batch: prompts of several requests, padded on the left, so that all of them end in the same column.

B is the number of sequences, P the columns of prompts, N the columns of new tokens. Every buffer is allocated once,
before the first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 0
"""The token id in padded columns. The mask hides it, so any id in the vocabulary would do."""

LOOK_EVERY = 16
"""On a GPU the check whether every sequence has ended synchronises with the host; it runs every so many tokens."""


@dataclass(frozen=True)
class Requests:
    """Prompts (token ids, none empty) that are generated together. `max_new_tokens` of each is at least 1.

    `numbers` are the numbers of the prompts in the whole run. They seed the random draws.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: Sequence[int]
    numbers: Sequence[int] = ()

    @property
    def width(self) -> int:
        """P: the length of the longest prompt."""
        return max(map(len, self.prompts))

    @property
    def new_columns(self) -> int:
        """N: the largest max_new_tokens."""
        return max(self.max_new_tokens)

    @property
    def shown(self) -> int:
        """Columns that the model sees in all: the last token is never an input."""
        return self.width + self.new_columns - 1

    @property
    def furthest(self) -> int:
        """Tokens of the longest sequence. They are fewer than P + N where the longest prompt does not have the largest
        max_new_tokens.
        """
        return max(
            len(prompt) + max_new_tokens
            for prompt, max_new_tokens in zip(self.prompts, self.max_new_tokens, strict=True)
        )


@dataclass(frozen=True)
class Batch:
    """Tokens, mask and positions of a batch, with columns for the new tokens."""

    tokens: Tensor  # [B, P + N] int64
    mask: Tensor | None  # [B, P + N] int64, 0 on padding; None where nothing is padded
    positions: Tensor  # [B, P + N] int64, counted from each prompt's first token
    ended: Tensor  # [B] bool
    max_new_tokens: Tensor | None  # [B] int64, max_new_tokens of each; None: no eos, or all are equal
    eos: Tensor  # [E] int64, empty where nothing ends a sequence
    width: int  # P

    def write(self, token: Tensor, column: int) -> None:
        """Write `token` [B] into `column` and update `ended`. `finish` removes the tokens after a sequence's end."""
        self.tokens[:, column] = token
        if len(self.eos):
            self.ended.logical_or_(torch.isin(token, self.eos))
        if self.max_new_tokens is not None:
            self.ended.logical_or_(self.max_new_tokens <= column + 1 - self.width)

    def done(self, column: int) -> bool:
        """Whether every sequence has ended before `column`. On a GPU this checks only every `LOOK_EVERY` columns."""
        skipped = self.ended.device.type != "cpu" and (column - self.width) % LOOK_EVERY
        return bool(len(self.eos)) and not skipped and bool(self.ended.all())


def pad_left(requests: Requests, eos: Sequence[int], device: torch.device) -> Batch:
    """Build one batch of `requests` with N columns for new tokens; a token in `eos` ends a sequence.

    Positions after a sequence's own end are clamped to the longest sequence, as a model may have no positions beyond
    that.
    """
    prompts, width = requests.prompts, requests.width
    limits = requests.max_new_tokens if eos and len(set(requests.max_new_tokens)) > 1 else []
    tokens = torch.full((len(prompts), width + requests.new_columns), PADDING)
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
        torch.tensor(limits, dtype=torch.int64, device=device) if limits else None,
        torch.tensor(eos, dtype=torch.int64, device=device),
        width,
    )
