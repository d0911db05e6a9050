"""A workload: how long each request's prompt is, and how many tokens it asks for."""

import json
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from harness.config.rules import sources
from harness.config.settings import Generation, Positive, Refusal
from harness.record.schema import printable

KEY = "generation.workload"
_FORM = 'write {"prompt_length": 64, "max_new_tokens": 8}, or "prompt" with a text'


class Request(NamedTuple):
    """A `text` to continue, or one of `length` tokens from the data, by up to `most` tokens; `place` is where it is.

    None: by as many as any.
    """

    text: str | None
    length: int
    most: int | None
    place: str


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str | None = None
    prompt_length: Positive | None = None
    max_new_tokens: Positive | None = None


def read(path: str) -> list[Request]:
    """The requests in the file of `generation.workload`, a JSON object a line. Raises Refusal."""
    written = sources.text(KEY, path, "give a file with a JSON object a line")
    found = []
    for number, line in enumerate(written.split("\n"), 1):
        if not line.strip():
            continue
        asked, wrong = _line(line)
        if asked is None:
            raise Refusal(KEY, path, f"line {number}: {wrong}; {_FORM}")
        if (asked.prompt is None) == (asked.prompt_length is None):
            raise Refusal(KEY, path, f"line {number} should have a prompt or its prompt_length; {_FORM}")
        place = f"line {number}"
        found.append(Request(asked.prompt, asked.prompt_length or 0, asked.max_new_tokens, place))
    if not found:
        raise Refusal(KEY, path, f"there is no request in it; {_FORM}")
    return found


def _line(line: str) -> tuple[_Line | None, str]:
    """What a line asks for; None where it is no request, and why."""
    try:
        asked = _Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where, said = " ".join(map(str, first["loc"])), first["msg"]
        for words in ("Input ", "Value error, "):
            said = said.removeprefix(words)
        said = "is no field of a request" if first["type"] == "extra_forbidden" else said
        return None, printable(f"{where} {said}".strip())
    names = [name for name, _ in json.loads(line, object_pairs_hook=list)]
    twice = next((name for name in names if names.count(name) > 1), None)
    return (asked, "") if twice is None else (None, f"{twice} is said twice")


def drawn(generation: Generation, limit: int, seed: int) -> list[Request]:
    """`generation.count` requests with the lengths that `generation.lengths` asks for, drawn by `seed`.

    The longest are a prompt of `generation.prompt_length` tokens and `limit` after it.
    """
    count = generation.count
    prompts = lengths(generation.lengths, count, generation.prompt_length, (seed, 0))
    most = lengths(generation.lengths if limit > 0 else "fixed", count, limit, (seed, 1))
    pairs = zip(prompts, most, strict=True)
    return [Request(None, *pair, f"prompt {number}") for number, pair in enumerate(pairs, 1)]


def lengths(
    kind: Literal["fixed", "uniform", "skewed"], count: int, longest: int, seed: tuple[int, int]
) -> list[int]:
    """`count` lengths from 1 to `longest`: all the longest; each as likely; or each as often as its double.

    The last is log-uniform: half of them are no longer than the root of the longest.
    """
    draws = np.random.default_rng(seed)
    if kind == "uniform":
        return [int(length) for length in draws.integers(1, longest + 1, count)]
    if kind == "skewed":
        return [int(length) for length in np.floor((longest + 1) ** draws.random(count))]
    return [longest] * count
