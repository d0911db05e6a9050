"""Digests by which a text and a tokenizer are known again."""

import hashlib
import json
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase


def of_texts(texts: Iterable[str | None]) -> str:
    """The sha256 of documents in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update((text or "").encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256 of its vocabulary, in hexadecimal."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
