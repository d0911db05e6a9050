"""Batches of tokens, sharded over ranks, in an order set by the seed.

A corpus is one long row of tokens, cut into blocks of one sequence each, and an incomplete last block is not used; or,
not packed, the beginnings of documents. Its end is held out for validation.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from harness.config.settings import Data, Refusal
from harness.data import chat
from harness.data.batch import Batch, Example, Form, Share, share_of
from harness.runtime.world import World

STORED_BYTES = 4
"""Bytes of a token, and of a label, in a stored row (int32)."""


class Blocks(Dataset[Example]):
    """Sequences `first` to `last` of stored rows: blocks of a row of tokens, or documents."""

    def __init__(self, row: Any, form: Form, first: int, last: int) -> None:
        self.row, self.form, self.first, self.last = row, form, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Example:
        begin, length = self.first + index, self.form.sequence
        if not self.form.packed:
            row = self.row[begin]
            labels = row["labels"][:length] if self.form.labelled else None
            return Example(row["tokens"][:length], labels)
        rows = self.row[begin * length : (begin + 1) * length]
        return Example(rows["token"], rows["label"] if self.form.labelled else None)

    def order(self, seed: int) -> Sequence[int]:
        """Every index once, shuffled by `seed`. It uses numpy, so that no tensor of it counts in the run's memory."""
        return np.random.default_rng(seed).permutation(len(self)).tolist()  # type: ignore[no-any-return]

    def share(self, indices: Sequence[int], batches: int) -> Share:
        """The share of each of `batches` in the sequences of these indices."""
        if self.form.packed or self.form.labelled:
            return share_of([self[index].counts for index in indices], batches)
        lengths = self.row[[self.first + index for index in indices]]["length"]
        shown = [min(length, self.form.sequence) for length in lengths]
        return share_of([(length - 1, length) for length in shown], batches)


class NoText(Blocks):
    """Any number of sequences of zeros: the data of a rehearsal."""

    def __init__(self, form: Form) -> None:
        super().__init__(None, form, 0, 2**62)

    def order(self, seed: int) -> Sequence[int]:
        return range(len(self))

    def __getitem__(self, index: int) -> Example:
        return self.form.nothing()

    def share(self, indices: Sequence[int], batches: int) -> Share:
        return Share(1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Stream(IterableDataset[Example]):
    """Sequences of a streamed dataset. Every `every`-th is held out; with `held_out` it yields only those.

    Each has the share of its step. `step`: sequences in a micro-batch, replicas, and micro-batches on each of them.
    """

    rows: Iterable[Any]
    form: Form
    every: int
    held_out: bool
    step: tuple[int, int, int] | None = None

    def __iter__(self) -> Iterator[Example]:
        numbered = enumerate(self._blocks() if self.form.packed else self._documents())
        own = (
            each
            for number, each in numbered
            if (self.every > 0 and number % self.every == 0) == self.held_out
        )
        return own if self.step is None or self.form.plain else self._with_shares(own, *self.step)

    def _blocks(self) -> Iterator[Example]:
        buffer: list[int] = []
        for row in self.rows:
            buffer.extend(row["tokens"])
            while len(buffer) >= self.form.sequence:
                block, buffer = buffer[: self.form.sequence], buffer[self.form.sequence :]
                yield Example(block)

    def _documents(self) -> Iterator[Example]:
        for row in self.rows:
            if len(row["tokens"]) > 1:
                yield Example(row["tokens"][: self.form.sequence])

    @staticmethod
    def _with_shares(
        examples: Iterator[Example], micro_batch: int, replicas: int, batches: int
    ) -> Iterator[Example]:
        at_once = micro_batch * replicas
        while group := list(islice(examples, at_once * batches)):
            used = group[: len(group) // at_once * at_once]  # the rest does not reach every replica
            share = share_of([each.counts for each in used], len(used) // micro_batch) if used else None
            yield from (each._replace(share=share) for each in used)


@dataclass(frozen=True)
class Corpus:
    """The data to train on, and the held-out data; None if nothing is held out.

    `digest` is that of the text, in hexadecimal; "" for a stream. `cut` are the tokens of documents beyond the
    sequence; None where none are, or it is not known.
    """

    train: Blocks | Stream
    validation: Blocks | Stream | None
    digest: str = ""
    cut: int | None = None


def corpus(
    settings: Data,
    tokenizer: PreTrainedTokenizerBase,
    sequence: int,
    world: World | None = None,
    read: bool = True,
) -> Corpus:
    """The corpus of `settings` in sequences of `sequence` tokens. Raises Refusal if there is no such text.

    With `world`, the first rank of each node prepares it and the others wait. Without, this process prepares it.
    Without `read` it has sequences of this length but no text.
    """
    form = _form(settings, tokenizer, sequence, world)
    if settings.kind == "chat":
        chat.check(settings, tokenizer)
    if not read:
        return Corpus(NoText(form), NoText(form) if settings.validation else None)
    from harness.data import text  # slow to import

    if settings.streaming:
        every = round(1 / settings.validation) if settings.validation else 0
        rows = text.streamed(settings, tokenizer)
        held_out = Stream(rows, form, every, True) if every else None
        return Corpus(Stream(rows, form, every, False), held_out)
    if world is not None and world.local_rank != 0:
        world.barrier()
        row = text.stored(settings, tokenizer)
    else:
        row = text.stored(settings, tokenizer)
        if world is not None:
            world.barrier()
    blocks = len(row) // sequence if settings.packing else len(row)
    held_out_blocks = int(np.ceil(blocks * settings.validation))
    if blocks - held_out_blocks < 1:
        size = (
            f"{len(row):,} tokens, too few for a block of {sequence}"
            if settings.packing
            else f"{len(row):,} documents, too few"
        )
        raise Refusal(
            *text.named(settings),
            f"it has {size} to train on beside the share that data.validation={settings.validation} holds out; "
            f"give more text{' or a shorter train.sequence' if settings.packing else ''}",
        )
    validation = Blocks(row, form, blocks - held_out_blocks, blocks) if held_out_blocks else None
    cut = None if settings.packing else text.beyond(row, sequence)
    return Corpus(Blocks(row, form, 0, blocks - held_out_blocks), validation, row.info.description, cut)


def _form(settings: Data, tokenizer: PreTrainedTokenizerBase, sequence: int, world: World | None) -> Form:
    """A stage passes hidden states alone to the next, so that in a pipeline there is no mask."""
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(each for each in pads if each is not None)
    masked = world is None or world.stages == 1
    return Form(sequence, settings.packing, settings.kind == "chat", masked, pad)


def loader(
    blocks: Blocks | Stream, micro_batch: int, world: World, seed: int, skip: int = 0, accumulation: int = 1
) -> Iterator[Batch]:
    """This rank's micro-batches, epoch after epoch, from the `skip`-th on.

    `seed` and the epoch alone set their order. A global batch is `world.dp_size` consecutive micro-batches of it. Last
    micro-batches that do not reach every replica are left out. Raises Refusal if not even one fits.

    Unless every position counts, each has the share of its step, which is `accumulation` micro-batches on every rank.
    Each rank computes it from the order alone.
    """
    at_once = micro_batch * world.dp_size
    if isinstance(blocks, Stream):
        stream = replace(blocks, step=(micro_batch, world.dp_size, accumulation))
        return islice(_epoch(stream, micro_batch, world, None), skip, None)
    batches_per_epoch = len(blocks) // at_once
    if batches_per_epoch == 0:
        raise Refusal(
            "train.micro_batch",
            micro_batch,
            f"{world.dp_size} ranks take {at_once} sequences of {blocks.form.sequence} tokens, "
            f"and the data has {len(blocks)}; give more text, fewer ranks or a shorter train.sequence",
        )
    batches = _epochs(blocks, micro_batch, world, seed, *divmod(skip, batches_per_epoch))
    if blocks.form.plain:
        return batches
    order = lru_cache(2)(lambda epoch: blocks.order(seed + epoch))

    @lru_cache(1)
    def share(step: int) -> Share:
        """The share of a step, whose micro-batches may be of two epochs."""
        places = (
            divmod(number, batches_per_epoch)
            for number in range(step * accumulation, (step + 1) * accumulation)
        )
        parts = (order(epoch)[place * at_once : (place + 1) * at_once] for epoch, place in places)
        return blocks.share([*chain.from_iterable(parts)], accumulation * world.dp_size)

    # map: a generator would keep the batch until the next
    return map(
        lambda batch, number: batch._replace(share=share(number // accumulation)), batches, count(skip)
    )


def _epochs(
    blocks: Blocks, micro_batch: int, world: World, seed: int, epoch: int, skip: int
) -> Iterator[Batch]:
    """Epochs from number `epoch` on. The first `skip` micro-batches of the first one are left out."""
    for number in count(epoch):
        batches = _epoch(blocks, micro_batch, world, blocks.order(seed + number))
        yield from skip_first_batches(batches, skip) if number == epoch and skip else batches


def _epoch(
    blocks: Blocks | Stream, micro_batch: int, world: World, order: Sequence[int] | None
) -> DataLoader[Batch]:
    all_ranks_loader = DataLoader(
        blocks,
        micro_batch,
        sampler=order,
        generator=torch.Generator(),  # a separate one: the global random state belongs to the model
        collate_fn=blocks.form.collate,
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
        return [[0] * length for _ in range(number)]
    text_corpus = corpus(settings, tokenizer, length)
    if isinstance(text_corpus.train, Stream):
        stream = text_corpus.validation if isinstance(text_corpus.validation, Stream) else text_corpus.train
        return [block.tokens for block in islice(stream, number)]
    held_out = text_corpus.validation if isinstance(text_corpus.validation, Blocks) else text_corpus.train
    if len(held_out) < number:
        raise Refusal(
            "generation.count",
            number,
            f"the held-out text has {len(held_out)} pieces of {length} tokens; ask for fewer or shorter prompts, or "
            "raise data.validation",
        )
    indices = np.random.default_rng(seed).choice(len(held_out), number, replace=False)
    return [held_out[int(index)].tokens for index in indices]
