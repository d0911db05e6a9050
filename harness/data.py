"""Text to batches of tokens, through datasets: tokenized once, memory-mapped after, sharded by rank, seeded.

A corpus is one long row of tokens, documents end to end with the tokenizer's end between them. It is cut into blocks
of one sequence each; the last part of a block is not used. The end of the row is held out for validation.
"""

import glob
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from harness.knobs import Data, Refusal
from harness.world import World

STDLIB_BYTES = 2 * 2**20
"""How much of the standard library's source is read: enough for a first run, and tokenized within seconds."""
LAYOUT = 1
"""Of the stored rows; another number is another place in the cache."""


class Blocks(Dataset[torch.Tensor]):
    """Blocks `first` to `last` of a row of tokens, each int64 [sequence]."""

    def __init__(self, row: Any, sequence: int, first: int, last: int) -> None:
        self.row, self.sequence, self.first, self.last = row, sequence, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = (self.first + index) * self.sequence
        return torch.tensor(self.row[begin : begin + self.sequence]["token"], dtype=torch.int64)


class Stream(IterableDataset[torch.Tensor]):
    """Blocks of a dataset that is read as it goes; every `every`-th is held out, and given where `held_out`."""

    def __init__(self, rows: Any, sequence: int, every: int, held_out: bool) -> None:
        self.rows, self.sequence, self.every, self.held_out = rows, sequence, every, held_out

    def __iter__(self) -> Iterator[torch.Tensor]:
        rest: list[int] = []
        number = 0
        for row in self.rows:
            rest.extend(row["tokens"])
            while len(rest) >= self.sequence:
                block, rest = rest[: self.sequence], rest[self.sequence :]
                if (self.every > 0 and number % self.every == 0) == self.held_out:
                    yield torch.tensor(block, dtype=torch.int64)
                number += 1


@dataclass(frozen=True)
class Corpus:
    """What is trained on, and what is held out; None where nothing is."""

    train: Blocks | Stream
    validation: Blocks | Stream | None


def corpus(
    settings: Data, tokenizer: PreTrainedTokenizerBase, sequence: int, world: World | None = None
) -> Corpus:
    """The corpus of `settings` in blocks of `sequence` tokens. Raises Refusal where there is no such text.

    With `world`, the first rank of each node prepares it and the others wait; without, this process does.
    """
    if settings.streaming:
        every = round(1 / settings.validation) if settings.validation else 0
        rows = _tokenized(_hub(settings), tokenizer, settings.column)
        held_out = Stream(rows, sequence, every, True) if every else None
        return Corpus(Stream(rows, sequence, every, False), held_out)
    if world is not None and world.local_rank != 0:
        world.barrier()
        row = _stored(settings, tokenizer)
    else:
        row = _stored(settings, tokenizer)
        if world is not None:
            world.barrier()
    blocks = len(row) // sequence
    kept_out = int(np.ceil(blocks * settings.validation))
    if blocks - kept_out < 1:
        raise Refusal(
            *_named(settings),
            f"it has {len(row):,} tokens, too few for a block of {sequence} to train on beside the share that "
            f"data.validation={settings.validation} holds out; give more text or a shorter train.sequence",
        )
    validation = Blocks(row, sequence, blocks - kept_out, blocks) if kept_out else None
    return Corpus(Blocks(row, sequence, 0, blocks - kept_out), validation)


def loader(
    blocks: Blocks | Stream, micro_batch: int, world: World, seed: int, skip: int = 0
) -> Iterator[torch.Tensor]:
    """This rank's micro-batches, int64 [micro_batch, sequence], epoch after epoch, from the `skip`-th on.

    Their order is decided by `seed` and the epoch alone; a global batch is `world.size` consecutive micro-batches of
    it. A last one that not every rank would have is left out. Raises Refusal where not even one fits.
    """
    if isinstance(blocks, Stream):
        return islice(_epoch(blocks, micro_batch, world, None), skip, None)
    each = len(blocks) // (micro_batch * world.size)
    if each == 0:
        raise Refusal(
            "train.micro_batch",
            micro_batch,
            f"{world.size} ranks take {micro_batch * world.size} sequences of {blocks.sequence} tokens at once, and "
            f"the data has {len(blocks)}; give more text, fewer ranks or a shorter train.sequence",
        )
    return _epochs(blocks, micro_batch, world, seed, *divmod(skip, each))


def _epochs(
    blocks: Blocks, micro_batch: int, world: World, seed: int, epoch: int, skip: int
) -> Iterator[torch.Tensor]:
    """Epoch after epoch from `epoch` on, of which the first `skip` micro-batches are left out."""
    for number in count(epoch):
        batches = _epoch(blocks, micro_batch, world, torch.Generator().manual_seed(seed + number))
        yield from skip_first_batches(batches, skip) if number == epoch and skip else batches


def _epoch(
    blocks: Blocks | Stream, micro_batch: int, world: World, shuffle: torch.Generator | None
) -> DataLoader[torch.Tensor]:
    whole = DataLoader(
        blocks,
        micro_batch,
        shuffle=shuffle is not None,
        generator=shuffle or torch.Generator(),
        collate_fn=torch.stack,
        drop_last=True,
    )
    return prepare_data_loader(  # type: ignore[no-any-return]
        whole,
        num_processes=world.size,
        process_index=world.rank,
        put_on_device=False,
        rng_types=[],
        dispatch_batches=False,
        even_batches=False,
    )


def sample_prompts(
    settings: Data, tokenizer: PreTrainedTokenizerBase, number: int, length: int, seed: int
) -> list[list[int]]:
    """`number` prompts of `length` tokens from places in the held-out text that `seed` chooses. Raises Refusal."""
    text = corpus(settings, tokenizer, length)
    if isinstance(text.train, Stream):
        stream = text.validation if isinstance(text.validation, Stream) else text.train
        return [block.tolist() for block in islice(stream, number)]
    held_out = text.validation if isinstance(text.validation, Blocks) else text.train
    if len(held_out) < number:
        raise Refusal(
            "generation.count",
            number,
            f"the held-out text has {len(held_out)} pieces of {length} tokens; ask for fewer or shorter prompts, or "
            "raise data.validation",
        )
    places = np.random.default_rng(seed).choice(len(held_out), number, replace=False)
    return [held_out[int(place)].tolist() for place in places]


# -- the stored row --------------------------------------------------------------------------------------------


def _stored(settings: Data, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The row of tokens, memory-mapped; made first where it is not there. A row is renamed into place when whole."""
    home = Path(settings.cache_dir or Path(datasets.config.HF_CACHE_HOME) / "harness").expanduser()
    files = _files(settings)
    place = home / _identity(settings, files, tokenizer)
    if not place.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=home))
        try:
            _make_row(settings, files, tokenizer, partial)
            os.rename(partial / "row", place)
        except OSError:
            if not place.is_dir():  # another process was not first either
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return datasets.load_from_disk(str(place))


def _make_row(
    settings: Data, files: list[Path] | None, tokenizer: PreTrainedTokenizerBase, partial: Path
) -> None:
    datasets.disable_progress_bars()
    texts = datasets.Dataset.from_dict({settings.column: _read(settings, files)}) if files else _hub(settings)
    tokenized = _tokenized(texts, tokenizer, settings.column)
    row = tokenized.map(
        lambda batch: {"token": [token for tokens in batch["tokens"] for token in tokens]},
        batched=True,
        remove_columns=tokenized.column_names,
        features=datasets.Features({"token": datasets.Value("int32")}),
        cache_file_name=str(partial / "flat.arrow"),
    )
    if not len(row):
        raise Refusal(*_named(settings), "there is no text in it")
    row.save_to_disk(str(partial / "row"))


def _tokenized(texts: Any, tokenizer: PreTrainedTokenizerBase, column: str) -> Any:
    """`texts` with a column `tokens`, each document ended by the tokenizer's own end."""
    end = tokenizer.eos_token_id

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        rows = tokenizer(batch[column], verbose=False).input_ids
        return {"tokens": [row if end is None or row[-1:] == [end] else [*row, end] for row in rows]}

    remove = list(texts.column_names or [column])
    streamed = isinstance(texts, datasets.IterableDataset)
    options = {} if streamed else {"load_from_cache_file": False, "keep_in_memory": True}
    return texts.map(tokens, batched=True, batch_size=64, remove_columns=remove, **options)


def _files(settings: Data) -> list[Path] | None:
    if settings.kind == "hub":
        return None
    if settings.kind == "stdlib":
        return _standard_library()
    given = Path(str(settings.path)).expanduser()
    if given.is_dir():
        found = sorted(path for path in given.rglob("*") if path.is_file())
    else:
        found = (
            [given]
            if given.is_file()
            else [Path(name) for name in sorted(glob.glob(str(given), recursive=True))]
        )
    if not found:
        raise Refusal(
            "data.path", settings.path, "there is no file; give a file, a directory or a quoted glob"
        )
    return found


def _standard_library() -> list[Path]:
    """This Python's own modules up to `STDLIB_BYTES`, in an order that mixes them: the end of it is held out."""
    home = Path(sysconfig.get_paths()["stdlib"])
    chosen, size = [], 0
    found = [*home.glob("*.py"), *home.glob("[a-z]*/*.py")]
    for path in sorted(
        found, key=lambda path: hashlib.sha256(path.relative_to(home).as_posix().encode()).digest()
    ):
        if not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.relative_to(home).parts):
            chosen.append(path)
            size += path.stat().st_size
            if size >= STDLIB_BYTES:
                break
    if not chosen:
        raise Refusal("data", "stdlib", f"this Python has no sources in {home}; use data=text data.path=")
    return chosen


def _read(settings: Data, files: list[Path]) -> list[str]:
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            if settings.kind == "stdlib":
                continue  # a few of its sources declare another encoding
            raise Refusal(
                "data.path", path, f"it is not UTF-8 text (byte {error.start}); leave it out or convert it"
            ) from error
        except OSError as error:
            raise Refusal("data.path", path, f"it cannot be read: {error.strerror}") from error
    if not any(texts):
        raise Refusal(*_named(settings), "there is no text in it")
    return texts


def _hub(settings: Data) -> Any:
    try:
        found = datasets.load_dataset(
            settings.name, split=settings.split, streaming=settings.streaming, cache_dir=settings.cache_dir
        )
    except Exception as error:  # the hub's client raises what its transports raise
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise Refusal("data.name", settings.name, f"it cannot be loaded: {said}") from error
    if found.column_names and settings.column not in found.column_names:
        raise Refusal("data.column", settings.column, f"it has the columns {', '.join(found.column_names)}")
    return found


def _identity(settings: Data, files: list[Path] | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of a row: the same text and tokenizer give the same one, anything else another."""
    if files is None:
        source: Any = [settings.name, settings.split, settings.column]
    else:
        source = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    parts = [LAYOUT, settings.kind, source, type(tokenizer).__name__, vocabulary, sys.version_info[:2]]
    return f"{settings.kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def _named(settings: Data) -> tuple[str, object]:
    """The key and value that chose the text."""
    return {
        "stdlib": ("data", "stdlib"),
        "text": ("data.path", settings.path),
        "hub": ("data.name", settings.name),
    }[settings.kind]
