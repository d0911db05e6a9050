"""Batches of tokens, sharded over ranks, in an order set by the seed.

A corpus is one long row of tokens, cut into blocks of one sequence each; an incomplete last block is not used. The
end of the row is held out for validation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from harness.config.settings import Data, Refusal
from harness.runtime.world import World

STORED_BYTES = 4
"""Bytes of a token in a stored row (int32)."""


class Blocks(Dataset[torch.Tensor]):
    """Blocks `first` to `last` of a row of tokens, each int64 [sequence]."""

    def __init__(self, row: Any, sequence: int, first: int, last: int) -> None:
        self.row, self.sequence, self.first, self.last = row, sequence, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(self.tokens(index), dtype=torch.int64)

    def order(self, seed: int) -> Sequence[int]:
        """Every index once, shuffled by `seed`. It uses numpy, so that no tensor of it counts in the run's memory."""
        return np.random.default_rng(seed).permutation(len(self)).tolist()  # type: ignore[no-any-return]

    def tokens(self, index: int) -> list[int]:
        """The tokens of block `index`, as a list."""
        begin = (self.first + index) * self.sequence
        return self.row[begin : begin + self.sequence]["token"]  # type: ignore[no-any-return]


class NoText(Blocks):
    """Any number of blocks of zeros: the data of a rehearsal."""

    def __init__(self, sequence: int) -> None:
        super().__init__(None, sequence, 0, 2**62)

    def order(self, seed: int) -> Sequence[int]:
        return range(len(self))

    def tokens(self, index: int) -> list[int]:
        return [0] * self.sequence


class Stream(IterableDataset[torch.Tensor]):
    """Blocks of a streamed dataset. Every `every`-th block is held out; with `held_out` it yields only those."""

    def __init__(self, rows: Any, sequence: int, every: int, held_out: bool) -> None:
        self.rows, self.sequence, self.every, self.held_out = rows, sequence, every, held_out

    def __iter__(self) -> Iterator[torch.Tensor]:
        buffer: list[int] = []
        number = 0
        for row in self.rows:
            buffer.extend(row["tokens"])
            while len(buffer) >= self.sequence:
                block, buffer = buffer[: self.sequence], buffer[self.sequence :]
                if (self.every > 0 and number % self.every == 0) == self.held_out:
                    yield torch.tensor(block, dtype=torch.int64)
                number += 1


@dataclass(frozen=True)
class Corpus:
    """The data to train on, and the held-out data; None if nothing is held out.

    `digest` is that of the text, in hexadecimal; "" for a stream.
    """

    train: Blocks | Stream
    validation: Blocks | Stream | None
    digest: str = ""


def corpus(
    settings: Data,
    tokenizer: PreTrainedTokenizerBase,
    sequence: int,
    world: World | None = None,
    read: bool = True,
) -> Corpus:
    """The corpus of `settings` in blocks of `sequence` tokens. Raises Refusal if there is no such text.

    With `world`, the first rank of each node prepares it and the others wait. Without, this process prepares it.
    Without `read` it has blocks of this length but no text.
    """
    if not read:
        return Corpus(NoText(sequence), NoText(sequence) if settings.validation else None)
    from harness.data import text  # slow to import

    if settings.streaming:
        every = round(1 / settings.validation) if settings.validation else 0
        rows = text.streamed(settings, tokenizer)
        held_out = Stream(rows, sequence, every, True) if every else None
        return Corpus(Stream(rows, sequence, every, False), held_out)
    if world is not None and world.local_rank != 0:
        world.barrier()
        row = text.stored(settings, tokenizer)
    else:
        row = text.stored(settings, tokenizer)
        if world is not None:
            world.barrier()
    blocks = len(row) // sequence
    held_out_blocks = int(np.ceil(blocks * settings.validation))
    if blocks - held_out_blocks < 1:
        raise Refusal(
            *text.named(settings),
            f"it has {len(row):,} tokens, too few for a block of {sequence} to train on beside the share that "
            f"data.validation={settings.validation} holds out; give more text or a shorter train.sequence",
        )
    validation = Blocks(row, sequence, blocks - held_out_blocks, blocks) if held_out_blocks else None
    return Corpus(Blocks(row, sequence, 0, blocks - held_out_blocks), validation, row.info.description)


def loader(
    blocks: Blocks | Stream, micro_batch: int, world: World, seed: int, skip: int = 0
) -> Iterator[torch.Tensor]:
    """This rank's micro-batches, int64 [micro_batch, sequence], epoch after epoch, from the `skip`-th on.

    `seed` and the epoch alone set their order. A global batch is `world.dp_size` consecutive micro-batches of it. Last
    micro-batches that do not reach every replica are left out. Raises Refusal if not even one fits.
    """
    if isinstance(blocks, Stream):
        return islice(_epoch(blocks, micro_batch, world, None), skip, None)
    batches_per_epoch = len(blocks) // (micro_batch * world.dp_size)
    if batches_per_epoch == 0:
        raise Refusal(
            "train.micro_batch",
            micro_batch,
            f"{world.dp_size} ranks take {micro_batch * world.dp_size} sequences of {blocks.sequence} tokens, "
            f"and the data has {len(blocks)}; give more text, fewer ranks or a shorter train.sequence",
        )
    return _epochs(blocks, micro_batch, world, seed, *divmod(skip, batches_per_epoch))


def _epochs(
    blocks: Blocks, micro_batch: int, world: World, seed: int, epoch: int, skip: int
) -> Iterator[torch.Tensor]:
    """Epochs from number `epoch` on. The first `skip` micro-batches of the first one are left out."""
    for number in count(epoch):
        batches = _epoch(blocks, micro_batch, world, blocks.order(seed + number))
        yield from skip_first_batches(batches, skip) if number == epoch and skip else batches


def _epoch(
    blocks: Blocks | Stream, micro_batch: int, world: World, order: Sequence[int] | None
) -> DataLoader[torch.Tensor]:
    all_ranks_loader = DataLoader(
        blocks,
        micro_batch,
        sampler=order,
        generator=torch.Generator(),  # a separate one: the global random state belongs to the model
        collate_fn=torch.stack,
        drop_last=True,
    )
    return prepare_data_loader(  # type: ignore[no-any-return]
        all_ranks_loader,
        num_processes=world.dp_size,
        process_index=world.dp_rank,
        put_on_device=False,
        rng_types=[],
        dispatch_batches=False,
        even_batches=False,
    )


def sample_prompts(
    settings: Data,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    length: int,
    seed: int,
    read: bool = True,
) -> list[list[int]]:
    """`number` prompts of `length` tokens from places in the held-out text that `seed` chooses. Raises Refusal.

    Without `read` they have this length but no text.
    """
    if not read:
        return [NoText(length).tokens(index) for index in range(number)]
    text_corpus = corpus(settings, tokenizer, length)
    if isinstance(text_corpus.train, Stream):
        stream = text_corpus.validation if isinstance(text_corpus.validation, Stream) else text_corpus.train
        return [block.tolist() for block in islice(stream, number)]
    held_out = text_corpus.validation if isinstance(text_corpus.validation, Blocks) else text_corpus.train
    if len(held_out) < number:
        raise Refusal(
            "generation.count",
            number,
            f"the held-out text has {len(held_out)} pieces of {length} tokens; ask for fewer or shorter prompts, or "
            "raise data.validation",
        )
    indices = np.random.default_rng(seed).choice(len(held_out), number, replace=False)
    return [held_out.tokens(int(index)) for index in indices]
