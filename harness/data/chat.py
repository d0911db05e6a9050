"""Conversations: read from JSON lines, and made tokens and labels by the tokenizer's chat template.

The loss is taken on the answers alone, the messages of the assistant. A template that marks them (`{% generation %}`)
says which tokens they are; else they are what a conversation has more than the one before, if the template leaves that
as it was.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from harness.config.errors import first_line, ours
from harness.config.rules import sources
from harness.config.settings import Data, Refusal
from harness.data.batch import IGNORED

KEY = "data.path"
FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In a template that marks answers."""


class Conversation(NamedTuple):
    """Messages in order, the tools that the template may name, and the file and line."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    path: str
    line: int

    def refusal(self, problem: str) -> Refusal:
        """What is wrong with it."""
        return Refusal(KEY, self.path, f"line {self.line}: {problem}")


def check(settings: Data, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise Refusal(
            "data.tokenizer",
            settings.tokenizer,
            "it has no chat template, and data=chat writes conversations by one; give data.tokenizer= of a chat model",
        )


def read(files: Sequence[Path]) -> list[Conversation]:
    """The conversations in `files`, one JSON object a line. Raises Refusal."""
    conversations = []
    for path in files:
        content = sources.text(KEY, str(path), "give smaller files, with a JSON object a line")
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                conversations.append(_parsed(line, str(path), number))
    return conversations


def _parsed(line: str, path: str, number: int) -> Conversation:
    def wrong(problem: str) -> Refusal:
        return Refusal(KEY, path, f"line {number}: {problem}; write {FORM}")

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong(f"it is not JSON ({first_line(error)})") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise wrong("it has no list of messages")
    for position, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise wrong(f"message {position} has no role")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise wrong(f"message {position} has no text as its content")
    if not any(message["role"] == "assistant" for message in messages):
        raise wrong("no message is the assistant's, so that there is nothing to learn")
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise wrong("its tools are no list")
    return Conversation(messages, tools, path, number)


def tokens_and_labels(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and their labels: -100 outside of answers. Raises Refusal."""
    try:
        if MARKED.search(str(tokenizer.get_chat_template())):
            tokens, answered = _marked(conversation, tokenizer)
        else:
            tokens, answered = _by_prefixes(conversation, tokenizer)
    except Refusal:
        raise
    except Exception as error:  # a template is a program, and raises what it likes
        if ours(error):
            raise
        raise conversation.refusal(f"the chat template does not take it: {first_line(error)}") from error
    if not any(answered):
        raise conversation.refusal("the chat template leaves out its answers")
    return tokens, [token if each else IGNORED for token, each in zip(tokens, answered, strict=True)]


def _marked(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokens, and whether each is within `{% generation %}`."""
    encoded: Mapping[str, Any] = tokenizer.apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(encoded["input_ids"]), [bool(each) for each in encoded["assistant_masks"]]


def _by_prefixes(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Tokens, and whether each is what an answer adds to the conversation before it. Raises Refusal if it adds to no
    unchanged beginning.
    """
    whole = _tokens(conversation, len(conversation.messages), False, tokenizer)
    answered = [False] * len(whole)
    for begin, end in _spans(conversation, tokenizer, whole):
        answered[begin:end] = [True] * (end - begin)
    return whole, answered


def _spans(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, whole: list[int]
) -> Iterator[tuple[int, int]]:
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before = _tokens(conversation, number, True, tokenizer) if number else []
        after = _tokens(conversation, number + 1, False, tokenizer)
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise conversation.refusal(
                f"which tokens are the answer in message {number + 1} cannot be known, as the chat template changes "
                "what comes before; give data.tokenizer= whose template marks answers with {% generation %}"
            )
        yield len(before), len(after)


def _tokens(
    conversation: Conversation, messages: int, prompt: bool, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The tokens of the first `messages`, with `prompt` as far as the next answer's beginning."""
    encoded: Any = tokenizer.apply_chat_template(
        conversation.messages[:messages],
        tools=conversation.tools,
        add_generation_prompt=prompt,
        return_dict=True,
    )
    return list(encoded["input_ids"])


def documents(settings: Data, files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """For each conversation its `text` as JSON, its `tokens` and its `labels`. Raises Refusal."""
    check(settings, tokenizer)
    yield from (
        {"text": json.dumps([each.messages, each.tools]), "tokens": tokens, "labels": labels}
        for each in read(files)
        for tokens, labels in [tokens_and_labels(each, tokenizer)]
    )
