"""Prompts: their source, their tokens, and whether the model can take them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from harness.config.load import Refusal, Settings
from harness.config.rules import sources
from harness.config.rules.positions import limit
from harness.data import token_batches, workload
from harness.data.workload import Request


class Prompt(NamedTuple):
    """A text to continue by up to `max_new_tokens`, and its source: the config key, its value and the place in it.

    `sets_max_new_tokens`: whether that place also has the number of new tokens.
    """

    text: str
    tokens: list[int]
    max_new_tokens: int
    key: str
    value: object
    place: str
    sets_max_new_tokens: bool = False


def find(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    limit: Callable[[int], int],
    read: bool = True,
) -> list[Prompt]:
    """Prompts from `generation.prompts`, `.prompt` or `.workload`, else held-out text of the data. Raises Refusal.

    `limit` maps the length of a prompt to the number of new tokens, for a prompt without its own number.
    Without `read`, sampled prompts have their length but no text.
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
    texts = iter(_sampled(settings, tokenizer, lengths, read))
    prompts = []
    key, value = origin
    for text, _, own_limit, place in requests:
        tokens = next(texts) if text is None else encode(tokenizer, text)
        max_new_tokens = limit(len(tokens)) if own_limit is None else own_limit
        if text is None:
            text = text_of(tokenizer, tokens) if read else ""
        shown_value, sets_max_new_tokens = (
            text[:40] if value is None else value,
            own_limit is not None and key == workload.KEY,
        )
        prompts.append(Prompt(text, tokens, max_new_tokens, key, shown_value, place, sets_max_new_tokens))
    return prompts


def _sampled(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], read: bool
) -> list[list[int]]:
    """Prompts of these lengths from the data."""
    if not lengths:
        return []
    longest = token_batches.sample_prompts(
        settings.data, tokenizer, len(lengths), max(lengths), settings.seed, read
    )
    return [tokens[:length] for tokens, length in zip(longest, lengths, strict=True)]


def lines(key: str, path: str) -> list[tuple[int, str]]:
    """The non-empty lines of a text file, numbered. Raises Refusal if there is none."""
    content = sources.text(key, path, "give a text file with one prompt a line")
    numbered = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line]
    if not numbered:
        raise Refusal(key, path, "there is no prompt in it; write one a line")
    return numbered


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`text` as tokens to continue. An end token that the tokenizer appends to every text is removed."""
    end = [tokenizer.eos_token_id]
    without_special = tokenizer("a", add_special_tokens=False).input_ids
    appends_end = tokenizer("a").input_ids[-1:] == end != without_special[-1:]
    tokens: list[int] = tokenizer(text, verbose=False).input_ids
    return tokens[:-1] if appends_end else tokens


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """`tokens` as text, without special tokens and ids that only the model has."""
    known_tokens = [token for token in tokens if token < len(tokenizer)]
    text = tokenizer.decode(known_tokens, skip_special_tokens=True)
    return text if isinstance(text, str) else "".join(text)


def check(prompts: Sequence[Prompt], config: PretrainedConfig) -> None:
    """Refuse a prompt without tokens, with more tokens than the model allows with the new ones, or with unknown ids."""
    text_config, longest = config.get_text_config(decoder=True), limit(config.to_dict())
    for _, tokens, max_new_tokens, key, value, place, sets_max_new_tokens in prompts:
        if not tokens:
            raise Refusal(key, value, f"{place} has no tokens; give it text")
        if max_new_tokens < 1:
            max_length = len(tokens) + max_new_tokens
            problem = (
                f"{place} has {len(tokens)} tokens, and the generation config's max_length is {max_length}"
            )
            raise Refusal(key, value, f"{problem}; shorten it, or give generation.max_new_tokens=")
        if longest is not None and len(tokens) + max_new_tokens > longest.tokens:
            remedies = (
                [f"shorten it to {longest.tokens - max_new_tokens}"]
                if max_new_tokens < longest.tokens
                else []
            )
            available = longest.tokens - len(tokens)
            shorter_answer = (
                f'give it "max_new_tokens": {available}'
                if sets_max_new_tokens
                else f"use generation.max_new_tokens={available}"
            )
            remedies += [shorter_answer] if available > 0 else []
            raise Refusal(
                key,
                value,
                f"{place} is {len(tokens)} tokens, {len(tokens) + max_new_tokens} with the new ones, and the "
                f"model allows {longest.tokens} ({longest.source}); {' or '.join(remedies) or 'shorten both'}",
            )
        if max(tokens) >= text_config.vocab_size:
            remedy = (
                f"{place} has token {max(tokens)}, and the model's vocabulary has {text_config.vocab_size}"
            )
            raise Refusal(key, value, f"{remedy}; give the model's own tokenizer with data.tokenizer=")
