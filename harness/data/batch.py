"""A micro-batch of a training run, how it is made of examples, and what of it counts.

Padded batches are those of transformers' collators: `input_ids`, `attention_mask` and `labels`, which are -100 where no
loss is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""The label of a position without loss: transformers' `ignore_index`."""


class Share(NamedTuple):
    """What a micro-batch has on average, over all of its step on all ranks: predicted tokens, and tokens of text."""

    labels: float
    tokens: float


class Example(NamedTuple):
    """The tokens of a sequence and their labels, without padding. `share` is that of its step, where known.

    `labels` None: the tokens.
    """

    tokens: list[int]
    labels: list[int] | None = None
    share: Share | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """How many tokens are predicted, and how many there are. Nothing predicts the first one."""
        labels = self.tokens if self.labels is None else self.labels
        return sum(label != IGNORED for label in labels[1:]), len(self.tokens)


class Batch(NamedTuple):
    """A micro-batch: tokens, labels and mask, each int64 [micro_batch, sequence].

    `labels` None: the tokens. `mask` None: no position is padding. `share` None: every position counts, in every batch.
    """

    tokens: Tensor
    labels: Tensor | None = None
    mask: Tensor | None = None
    share: Share | None = None

    @property
    def targets(self) -> Tensor:
        """The labels, whether or not they are the tokens."""
        return self.tokens if self.labels is None else self.labels

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        named = {"tokens": self.tokens, "labels": self.labels, "mask": self.mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def arguments(self) -> dict[str, Any]:
        """What a transformers model takes to compute the loss.

        `num_items_in_batch` makes it the sum over the batch by the mean number of labels in a batch of the step: the
        mean over batches and ranks is then the mean per label, as transformers' Trainer has it.
        """
        items = {} if self.share is None else {"num_items_in_batch": self.share.labels}
        mask = {} if self.mask is None else {"attention_mask": self.mask}
        return {"input_ids": self.tokens, "labels": self.targets, **mask, **items}

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Batch(moved["tokens"], moved.get("labels"), moved.get("mask"), self.share)


@dataclass(frozen=True)
class Form:
    """The form of batches: sequences of `sequence` tokens, cut from a row or (`packed` false) padded with `pad`.

    `labelled`: labels are stored beside the tokens. `masked`: a padded batch has its mask.
    """

    sequence: int
    packed: bool = True
    labelled: bool = False
    masked: bool = True
    pad: int = 0

    @property
    def plain(self) -> bool:
        """Whether a batch is its tokens alone, and all of them count."""
        return self.packed and not self.labelled

    def nothing(self) -> Example:
        """An example without text, for a rehearsal. Where there may be padding, it has some."""
        tokens = [0] * (self.sequence if self.packed else self.sequence - 1)
        return Example(tokens, tokens if self.labelled else None, Share(1.0, 1.0))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One batch of `examples`, padded on the right. All of them have the same share."""
        if self.plain:
            rows = [torch.tensor(each.tokens, dtype=torch.int64) for each in examples]
            return Batch(torch.stack(rows))
        labels = [each.tokens if each.labels is None else each.labels for each in examples]
        return Batch(
            self._tensor([each.tokens for each in examples], self.pad),
            self._tensor(labels, IGNORED),
            self._tensor([[1] * len(each.tokens) for each in examples], 0)
            if self.masked and not self.packed
            else None,
            examples[0].share,
        )

    def _tensor(self, rows: Sequence[list[int]], pad: int) -> Tensor:
        return torch.tensor([row + [pad] * (self.sequence - len(row)) for row in rows], dtype=torch.int64)


def share_of(counts: Sequence[tuple[int, int]], batches: int) -> Share:
    """The share of each of `batches` in examples of these `counts`. Without any label it is 1: the loss is then 0."""
    labels, tokens = (sum(each) for each in zip(*counts, strict=True))
    return Share(max(labels, 1) / batches, tokens / batches)
