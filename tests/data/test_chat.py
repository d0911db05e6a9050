"""Conversations: their answers alone are learnt, and what is none is refused with its line."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from harness.config.settings import Data, Refusal
from harness.data import chat, token_batches
from harness.data.batch import IGNORED
from harness.runtime.world import World
from tests.chats import LATEST, MARKED, TURNS, chatter, conversation

ALONE = World(0, 1, 0, torch.device("cpu"))
LINE = conversation("hi", "ho", "so?", "yes")
TEXT = "<user>hi\n<assistant>ho\n<user>so?\n<assistant>yes\n"
LEARNT = "ho\nyes\n"


def given(tmp_path: Path, *lines: str, packing: bool = True) -> Data:
    """The settings for a file of these lines."""
    (tmp_path / "chat.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return Data(
        kind="chat",
        path=str(tmp_path / "chat.jsonl"),
        packing=packing,
        validation=0,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.mark.parametrize("template", [TURNS, MARKED])
def test_the_answers_are_learnt_and_nothing_else(tmp_path: Path, template: str) -> None:
    tokenizer = chatter(template)
    (read,) = chat.read([Path(str(given(tmp_path, LINE).path))])
    tokens, labels = chat.tokens_and_labels(read, tokenizer)
    assert tokenizer.decode(tokens) == TEXT
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == LEARNT
    assert all(label in (IGNORED, token) for token, label in zip(tokens, labels, strict=True))


def test_a_template_that_changes_what_was_said_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        Refusal, match=r"chat.jsonl: line 1: which tokens are the answer in message 2 cannot be known"
    ):
        token_batches.corpus(given(tmp_path, LINE), chatter(LATEST), 8)


def test_a_tokenizer_without_a_template_is_refused_before_any_text_is_read(tmp_path: Path) -> None:
    for read in (True, False):
        with pytest.raises(Refusal, match=r"^data.tokenizer=null: it has no chat template"):
            token_batches.corpus(given(tmp_path, LINE), chatter(None), 8, read=read)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "it is not JSON"),
        ("[" * 10**5, "it is not JSON"),
        ("[]", "it has no list of messages"),
        ('{"messages": []}', "it has no list of messages"),
        ('{"messages": ["hi"]}', "message 1 has no role"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text as its content"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 has no text as its content"),
        (conversation("hi"), "no message is the assistant's"),
        (json.dumps({**json.loads(LINE), "tools": "hammer"}), "its tools are no list"),
    ],
)
def test_a_line_that_is_no_conversation_is_refused_with_its_number(
    tmp_path: Path, line: str, problem: str
) -> None:
    with pytest.raises(Refusal, match=rf"chat.jsonl: line 3: {problem}"):
        token_batches.corpus(given(tmp_path, LINE, "", line), chatter(), 8)


def test_a_file_of_blank_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"chat.jsonl: there is no conversation in it"):
        token_batches.corpus(given(tmp_path, "", " "), chatter(), 8)


def test_what_a_template_raises_is_one_sentence(tmp_path: Path) -> None:
    strict = chatter("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Refusal, match=r"line 1: the chat template does not take it: roles must alternate"):
        token_batches.corpus(given(tmp_path, LINE), strict, 8)
    with pytest.raises(Refusal, match=r"line 1: the chat template leaves out its answers"):
        token_batches.corpus(
            given(tmp_path, LINE), chatter("{% if false %}{% generation %}{% endgeneration %}{% endif %}x"), 8
        )


def test_packed_conversations_are_one_row_of_tokens_and_one_of_labels(tmp_path: Path) -> None:
    tokenizer = chatter()
    corpus = token_batches.corpus(given(tmp_path, LINE, LINE), tokenizer, len(TEXT))
    batch = next(token_batches.loader(corpus.train, 2, ALONE, 0))
    assert [tokenizer.decode(row) for row in batch.tokens] == [TEXT, TEXT]
    assert batch.mask is None
    assert batch.labels is not None
    assert batch.share is not None
    assert tokenizer.decode(batch.labels[batch.labels != IGNORED]) == LEARNT * 2
    assert batch.share == (2 * len(LEARNT), 2 * len(TEXT))


def test_unpacked_conversations_are_cut_and_padded(tmp_path: Path) -> None:
    tokenizer, short = chatter(), conversation("a", "b")
    corpus = token_batches.corpus(given(tmp_path, LINE, short, packing=False), tokenizer, 24)
    assert corpus.cut == len(TEXT) - 24
    (batch,) = islice(token_batches.loader(corpus.train, 2, ALONE, 0), 1)
    assert batch.labels is not None
    assert batch.mask is not None
    rows = {
        tokenizer.decode(tokens[mask == 1]): tokenizer.decode(labels[labels != IGNORED])
        for tokens, labels, mask in zip(batch.tokens, batch.labels, batch.mask, strict=True)
    }
    assert rows == {TEXT[:24]: "ho\n"[: 24 - len("<user>hi\n<assistant>")], "<user>a\n<assistant>b\n": "b\n"}


def test_another_template_is_another_text(tmp_path: Path) -> None:
    data = given(tmp_path, LINE)
    digests = {token_batches.corpus(data, chatter(each), 8).digest for each in (TURNS, MARKED, TURNS)}
    assert len(digests) == 2
