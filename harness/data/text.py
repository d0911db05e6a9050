"""From text to one long row of tokens: documents end to end, separated by the tokenizer's end token, with datasets.

Unpacked, each row is a document. Conversations have labels beside their tokens. All is tokenized once, stored, and
memory-mapped later. A streamed row is tokenized while it is read.
"""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from harness.config.errors import first_line, ours
from harness.config.rules import sources
from harness.config.settings import Data, Refusal
from harness.data import chat
from harness.data.text_digest import of_texts, of_tokenizer
from harness.runtime.files import writing

STDLIB_BYTES = 2 * 2**20
"""How many bytes of the standard library's source are read: enough for a first run, tokenized within seconds."""
LAYOUT = 3
"""Version of the stored rows. Another version has another place in the cache."""


def stored(settings: Data, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The rows of tokens, memory-mapped, and created first if they are missing. Raises Refusal if there is no text.

    Packed, a row is one `token`, of conversations with its `label`. Else a row is a document of two tokens or more:
    `tokens`, `length`, and of conversations `labels`. Its `info.description` is the digest of what decides the tokens.
    It is renamed into place when it is complete.
    """
    cache = Path(settings.cache_dir or Path(datasets.config.HF_CACHE_HOME) / "harness").expanduser()
    files = _files(settings)
    row_directory = cache / _identity(settings, files, tokenizer)
    if not row_directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
        try:
            with writing(row_directory):
                _make_row(settings, files, tokenizer, partial)
                os.rename(partial / "row", row_directory)
        except OSError:
            if not row_directory.is_dir():  # unless another process has stored it meanwhile
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return datasets.load_from_disk(str(row_directory))


def beyond(rows: Any, sequence: int) -> int:
    """The tokens of stored documents that come after their first `sequence`."""
    lengths = rows.with_format("numpy")["length"][:]
    return int(np.maximum(lengths - sequence, 0).sum())


def streamed(settings: Data, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The documents of `data=hub` while they are read, each a list `tokens`. Raises Refusal."""
    return _tokenized(_hub_dataset(settings), tokenizer, settings.column)


def _make_row(
    settings: Data, files: list[Path] | None, tokenizer: PreTrainedTokenizerBase, partial: Path
) -> None:
    datasets.disable_progress_bars()
    prefix: list[str] = []
    if settings.kind == "chat":
        conversations = list(chat.documents(settings, files or [], tokenizer))
        if not conversations:
            raise Refusal(*named(settings), "there is no conversation in it")
        texts = datasets.Dataset.from_list(conversations)
        tokenized, prefix = texts.remove_columns("text"), [str(tokenizer.get_chat_template())]
    else:
        texts = (
            datasets.Dataset.from_dict({settings.column: _texts_of(settings, files)})
            if files
            else _hub_dataset(settings)
        )
        tokenized = _tokenized(texts, tokenizer, settings.column)
    labelled = "labels" in tokenized.column_names
    rows = tokenized.map(
        _end_to_end if settings.packing else _apart,
        batched=True,
        remove_columns=tokenized.column_names,
        features=_features(settings.packing, labelled),
        cache_file_name=str(partial / "flat.arrow"),
    )
    if not len(rows):
        raise Refusal(*named(settings), "there is no text in it")
    column = "text" if settings.kind == "chat" else settings.column
    documents = (text for batch in texts.iter(batch_size=64) for text in batch[column])
    rows.info.description = of_texts(chain(prefix, documents))
    rows.save_to_disk(str(partial / "row"))


SINGULAR = {"tokens": "token", "labels": "label"}
"""The columns of a document, and what each becomes in a packed row."""


def _features(packed: bool, labelled: bool) -> datasets.Features:
    names, number = list(SINGULAR)[: 1 + labelled], datasets.Value("int32")
    if packed:
        return datasets.Features({SINGULAR[name]: number for name in names})
    return datasets.Features({**{name: datasets.List(number) for name in names}, "length": number})


def _end_to_end(batch: dict[str, list[list[int]]]) -> dict[str, list[int]]:
    return {SINGULAR[name]: list(chain.from_iterable(lists)) for name, lists in batch.items()}


def _apart(batch: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
    """The documents in which a token follows another, with their lengths."""
    lengths = [len(tokens) for tokens in batch["tokens"]]
    numbers = [number for number, length in enumerate(lengths) if length > 1]
    return {name: [lists[number] for number in numbers] for name, lists in batch.items()} | {
        "length": [lengths[number] for number in numbers]
    }


def _tokenized(texts: Any, tokenizer: PreTrainedTokenizerBase, column: str) -> Any:
    """`texts` with a column `tokens`, in which each document ends with the tokenizer's end token."""
    end = tokenizer.eos_token_id

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text or "" for text in batch[column]]  # a row may have no text
        if other_types := {type(text).__name__ for text in texts} - {"str"}:
            raise Refusal(
                "data.column", column, f"it has {min(other_types)}, and not text; name one that has text"
            )
        rows = tokenizer(texts, verbose=False).input_ids
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
    return [Path(name) for name in sources.files("data.path", str(settings.path))]


def _standard_library() -> list[Path]:
    """This Python's own modules up to `STDLIB_BYTES`, in a mixed order, because the end of the row is held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    selected, size = [], 0
    candidates = [*library.glob("*.py"), *library.glob("[a-z]*/*.py")]
    for path in sorted(
        candidates, key=lambda path: hashlib.sha256(path.relative_to(library).as_posix().encode()).digest()
    ):
        if not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(
            path.relative_to(library).parts
        ):
            selected.append(path)
            size += path.stat().st_size
            if size >= STDLIB_BYTES:
                break
    if not selected:
        raise Refusal("data", "stdlib", f"this Python has no sources in {library}; use data=text data.path=")
    return selected


def _texts_of(settings: Data, files: list[Path]) -> list[str]:
    texts = []
    for path in files:
        try:
            texts.append(sources.text("data.path", str(path), "leave it out"))
        except Refusal:
            if settings.kind != "stdlib":
                raise
            continue  # a few modules declare another encoding
    if not any(texts):
        raise Refusal(*named(settings), "there is no text in it")
    return texts


def _hub_dataset(settings: Data) -> Any:
    try:
        dataset = datasets.load_dataset(
            settings.name, split=settings.split, streaming=settings.streaming, cache_dir=settings.cache_dir
        )
    except Exception as error:  # the hub's client raises what its transports raise
        if ours(error):
            raise
        raise Refusal("data.name", settings.name, f"it cannot be loaded: {first_line(error)}") from error
    if dataset.column_names and settings.column not in dataset.column_names:
        raise Refusal("data.column", settings.column, f"it has the columns {', '.join(dataset.column_names)}")
    return dataset


def _identity(settings: Data, files: list[Path] | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of a row: the same text and tokenizer have the same name, everything else has another."""
    if files is None:
        source: Any = [settings.name, settings.split, settings.column]
    else:
        source = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    names = type(tokenizer).__name__, of_tokenizer(tokenizer)
    parts = [LAYOUT, settings.kind, source, *names, sys.version_info[:2]]
    parts += [] if settings.packing else ["documents"]
    parts += [tokenizer.get_chat_template()] if settings.kind == "chat" else []
    return f"{settings.kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def named(settings: Data) -> tuple[str, object]:
    """The key and value that chose the text."""
    return {
        "stdlib": ("data", "stdlib"),
        "text": ("data.path", settings.path),
        "chat": ("data.path", settings.path),
        "hub": ("data.name", settings.name),
    }[settings.kind]
