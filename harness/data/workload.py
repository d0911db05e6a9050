"""A workload: each request's prompt length, and its number of new tokens."""

import json
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from harness.config.fields.kinds import Positive
from harness.config.rules import sources
from harness.config.settings import Generation, Refusal
from harness.record.fields import printable

KEY = "generation.workload"
_EXPECTED_FORM = 'write {"prompt_length": 64, "max_new_tokens": 8}, or "prompt" with a text'


class Request(NamedTuple):
    """A `text` to continue, or a prompt of `length` tokens from the data, by up to `max_new_tokens`.

    `max_new_tokens` None: no limit of its own. `place` is its position in the source.
    """

    text: str | None
    length: int
    max_new_tokens: int | None
    place: str


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str | None = None
    prompt_length: Positive | None = None
    max_new_tokens: Positive | None = None


def read(path: str) -> list[Request]:
    """The requests in the file of `generation.workload`, one JSON object per line. Raises Refusal."""
    content = sources.text(KEY, path, "give a file with a JSON object a line")
    requests = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        request, problem = _parse_line(line)
        if request is None:
            raise Refusal(KEY, path, f"line {number}: {problem}; {_EXPECTED_FORM}")
        if (request.prompt is None) == (request.prompt_length is None):
            raise Refusal(
                KEY, path, f"line {number} should have a prompt or its prompt_length; {_EXPECTED_FORM}"
            )
        place = f"line {number}"
        requests.append(Request(request.prompt, request.prompt_length or 0, request.max_new_tokens, place))
    if not requests:
        raise Refusal(KEY, path, f"there is no request in it; {_EXPECTED_FORM}")
    return requests


def _parse_line(line: str) -> tuple[_Line | None, str]:
    """The request of a line. For an invalid line, None and the reason."""
    try:
        request = _Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field, message = " ".join(map(str, first["loc"])), first["msg"]
        for prefix in ("Input ", "Value error, "):
            message = message.removeprefix(prefix)
        message = "is not a field of a request" if first["type"] == "extra_forbidden" else message
        return None, printable(f"{field} {message}".strip())
    names = [name for name, _ in json.loads(line, object_pairs_hook=list)]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    return (request, "") if duplicate is None else (None, f"{duplicate} appears twice")


def drawn(generation: Generation, limit: int, seed: int) -> list[Request]:
    """`generation.count` requests with lengths by `generation.lengths`, drawn with `seed`.

    The longest prompt has `generation.prompt_length` tokens, and at most `limit` new tokens.
    """
    count = generation.count
    prompts = lengths(generation.lengths, count, generation.prompt_length, (seed, 0))
    new_tokens = lengths(generation.lengths if limit > 0 else "fixed", count, limit, (seed, 1))
    pairs = zip(prompts, new_tokens, strict=True)
    return [Request(None, *pair, f"prompt {number}") for number, pair in enumerate(pairs, 1)]


def lengths(
    kind: Literal["fixed", "uniform", "skewed"], count: int, longest: int, seed: tuple[int, int]
) -> list[int]:
    """`count` lengths from 1 to `longest`. "fixed": all are `longest`. "uniform": all are equally likely. "skewed": a
    length is as likely as its double.

    "skewed" is log-uniform: half of the lengths do not exceed the square root of `longest`.
    """
    generator = np.random.default_rng(seed)
    if kind == "uniform":
        return [int(length) for length in generator.integers(1, longest + 1, count)]
    if kind == "skewed":
        return [int(length) for length in np.floor((longest + 1) ** generator.random(count))]
    return [longest] * count
