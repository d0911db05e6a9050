"""Prompts: where they come from, as tokens, and whether the model can take them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from harness.config.load import Refusal, Settings
from harness.config.rules import sources
from harness.config.rules.positions import limit
from harness.data import token_batches, workload
from harness.data.workload import Request


class Prompt(NamedTuple):
    """What to continue by up to `most` tokens, and where it was given: the key, its value and the place in it.

    `said` is whether that place says `most`, too.
    """

    text: str
    tokens: list[int]
    most: int
    key: str
    value: object
    place: str
    said: bool = False


def find(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    limit: Callable[[int], int],
    rehearsed: bool = False,
) -> list[Prompt]:
    """From `generation.prompts`, `.prompt` or `.workload`, else held-out text of the data. Raises Refusal.

    `limit` says how many tokens may follow a prompt of so many, where it does not say so itself. Where it is
    `rehearsed`, sampled prompts have their length and no text.
    """
    generation = settings.generation
    origin: tuple[str, object]
    if generation.prompts is not None:
        origin = "generation.prompts", generation.prompts
        requests = [Request(line, 0, None, f"line {number}") for number, line in lines(*origin)]
    elif generation.prompt:
        origin = "generation.prompt", None
        requests = [
            Request(text, 0, None, f"prompt {number}") for number, text in enumerate(generation.prompt, 1)
        ]
    elif generation.workload is not None:
        origin = workload.KEY, generation.workload
        requests = workload.read(generation.workload)
    else:
        origin = "generation.prompt_length", generation.prompt_length
        requests = workload.drawn(generation, limit(generation.prompt_length), settings.seed)
    lengths = [request.length for request in requests if request.text is None]
    texts = iter(_sampled(settings, tokenizer, lengths, rehearsed))
    found = []
    key, value = origin
    for text, _, asked, place in requests:
        tokens = next(texts) if text is None else encode(tokenizer, text)
        most = limit(len(tokens)) if asked is None else asked
        told = text_of(tokenizer, tokens) if text is None else text
        given, said = told[:40] if value is None else value, asked is not None and key == workload.KEY
        found.append(Prompt(told, tokens, most, key, given, place, said))
    return found


def _sampled(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], rehearsed: bool
) -> list[list[int]]:
    """Prompts of these lengths from the data."""
    if not lengths:
        return []
    longest = token_batches.sample_prompts(
        settings.data, tokenizer, len(lengths), max(lengths), settings.seed, rehearsed
    )
    return [tokens[:length] for tokens, length in zip(longest, lengths, strict=True)]


def lines(key: str, path: str) -> list[tuple[int, str]]:
    """A text file's lines, numbered; empty ones are passed over. Raises Refusal where none is left."""
    written = sources.text(key, path, "give a text file with one prompt a line")
    found = [(number, line) for number, line in enumerate(written.split("\n"), 1) if line]
    if not found:
        raise Refusal(key, path, "there is no prompt in it; write one a line")
    return found


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`text` as tokens to be continued: an end that the tokenizer puts after every text is taken off."""
    end = [tokenizer.eos_token_id]
    bare = tokenizer("a", add_special_tokens=False).input_ids
    closes = tokenizer("a").input_ids[-1:] == end != bare[-1:]
    tokens: list[int] = tokenizer(text, verbose=False).input_ids
    return tokens[:-1] if closes else tokens


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """`tokens` as text; those without one are left out: special ones, and ids that only the model has."""
    known = [token for token in tokens if token < len(tokenizer)]
    text = tokenizer.decode(known, skip_special_tokens=True)
    return text if isinstance(text, str) else "".join(text)


def check(prompts: Sequence[Prompt], config: PretrainedConfig) -> None:
    """Refuse a prompt with no tokens, with more than the model allows with the new ones, or unknown ones."""
    shape, longest = config.get_text_config(decoder=True), limit(config.to_dict())
    for _, tokens, most, key, value, place, said in prompts:
        if not tokens:
            raise Refusal(key, value, f"{place} has no tokens; give it text")
        if most < 1:
            told = f"{place} is {len(tokens)} tokens, and the generation config's max_length {len(tokens) + most}"
            raise Refusal(key, value, f"{told}; shorten it, or give generation.max_new_tokens=")
        if longest is not None and len(tokens) + most > longest.tokens:
            ways = [f"shorten it to {longest.tokens - most}"] if most < longest.tokens else []
            left = longest.tokens - len(tokens)
            use = f'give it "max_new_tokens": {left}' if said else f"use generation.max_new_tokens={left}"
            ways += [use] if left > 0 else []
            raise Refusal(
                key,
                value,
                f"{place} is {len(tokens)} tokens, {len(tokens) + most} with the new ones, and the "
                f"model allows {longest.tokens} ({longest.said}); {' or '.join(ways) or 'shorten both'}",
            )
        if max(tokens) >= shape.vocab_size:
            remedy = f"{place} has token {max(tokens)}, and the model knows {shape.vocab_size}"
            raise Refusal(key, value, f"{remedy}; give the model's own tokenizer with data.tokenizer=")
