"""A small tokenizer with a chat template, and conversations for it."""

import json

from transformers import PreTrainedTokenizerFast

from harness.model.tokenizer import of_bytes

TURNS = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A template that leaves what comes before a message as it was."""

MARKED = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}\n{% endgeneration %}"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
)
"""The same text, with the answers marked."""

LATEST = TURNS.replace("message.content", "(message.content if loop.last else '...')")
"""A template that shortens all but the last message."""


def chatter(template: str | None = TURNS) -> PreTrainedTokenizerFast:
    """The tokenizer of bytes, with a template."""
    tokenizer = of_bytes()
    tokenizer.chat_template = template
    return tokenizer


def conversation(*contents: str) -> str:
    """A line of JSON: the user, the assistant, and so on by turns."""
    roles = ("user", "assistant")
    return json.dumps(
        {"messages": [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]}
    )


def conversations(number: int) -> str:
    """So many lines, whose questions and answers have several lengths."""
    return "".join(f"{conversation('q' * (each % 3), 'a' * (each % 5 + 1))}\n" for each in range(number))
