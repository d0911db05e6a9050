"""Choose the next token of each sequence from logits: transformers' logits processors, then argmax or a random draw.

B sequences, P columns of prompts, N columns of new tokens, V tokens in the vocabulary. Each sequence gets the token
that it would get alone: a processor that looks at tokens sees only sequences with prompts of the same length, and no
padding.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PretrainedConfig

from harness.config.generation_fields import PROCESSED
from harness.config.strategy import Strategy
from harness.generation.batch import Requests
from harness.ledger import Ledger
from harness.ledger.tensors import tensors_in

Choose = Callable[[Tensor, int], Tensor]
"""From logits [B, V] in fp32 and the number of the new token (0 is the first) to the chosen tokens, [B]."""

LOOKING = (
    *("repetition_penalty", "encoder_repetition_penalty", "sequence_bias", "bad_words_ids"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("min_length", "forced_bos_token_id", "forced_eos_token_id"),
)
"""Fields whose processors look at tokens or count those of a prompt. They must not see padding."""


class _Part(NamedTuple):
    """Sequences with prompts of equal length: their rows (None: all), the column where they begin, their processors."""

    rows: Tensor | None
    begin: int
    processors: LogitsProcessorList


class _Host(GenerationMixin):
    """The minimum that transformers' `_get_logits_processor` needs of a model."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config


def greedy(logits: Tensor, number: int) -> Tensor:
    """The most likely token of each sequence."""
    return logits.argmax(dim=-1)


def nobody(tokens: int) -> None:
    """A callback that does nothing."""


def reporting(choose: Choose, report: Callable[[int], object]) -> Choose:
    """`choose`, followed by a call of `report` with the number of chosen tokens."""

    def choose_and_report(logits: Tensor, number: int) -> Tensor:
        chosen = choose(logits, number)
        report(len(chosen))
        return chosen

    return choose_and_report


def draws(seed: int, numbers: Sequence[int], new_columns: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) for `drawn`, [B, N] fp32: a row for each sequence, a column for each new token.

    `numbers` are the sequences' numbers in the whole run. A row depends only on `seed` and its number, not on
    neighbours, rank or device. A longer row begins with the shorter one.
    """
    rows = [np.random.default_rng((seed, number)).random(new_columns, np.float32) for number in numbers]
    return torch.tensor(np.stack(rows), device=device)


def drawn(scores: Tensor, uniform: Tensor) -> Tensor:
    """Sample a token for each row of `scores` [B, V], by inverse transform of `uniform` [B]."""
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)  # [B, V]
    threshold = uniform[:, None] * cumulative[:, -1:]  # [B, 1]; the total is only nearly 1
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def chooser(
    strategy: Strategy, requests: Requests, tokens: Tensor, config: PretrainedConfig, ledger: Ledger
) -> Choose:
    """The function that chooses tokens for `requests` by `strategy`. `tokens` [B, P + N] has the prompts and receives
    the new tokens.
    """
    if not strategy.processed and not strategy.samples:
        return greedy
    uniform = None
    if strategy.samples:
        uniform = draws(strategy.seed, requests.numbers, requests.new_columns, tokens.device)
        ledger.claim("inputs", "draws", uniform)
    parts = list(_parts(strategy, requests, tokens, config))
    for tensor in (each for part in parts for each in tensors_in((part.rows, *map(vars, part.processors)))):
        ledger.claim("inputs", "logits processors", tensor)

    def choose_for(part: _Part, logits: Tensor, number: int) -> Tensor:
        context = tokens[:, part.begin : requests.width + number]
        scores: Tensor = part.processors(context if part.rows is None else context[part.rows], logits)
        if uniform is None:
            return scores.argmax(dim=-1)
        column = uniform[:, number]
        return drawn(scores, column if part.rows is None else column[part.rows])

    def choose(logits: Tensor, number: int) -> Tensor:
        if parts[0].rows is None:
            return choose_for(parts[0], logits, number)
        chosen = torch.empty_like(tokens[:, 0])
        for part in parts:
            chosen[part.rows] = choose_for(part, logits[part.rows], number)
        return chosen

    return choose


def _parts(
    strategy: Strategy, requests: Requests, tokens: Tensor, config: PretrainedConfig
) -> Iterator[_Part]:
    """All rows as one part, or one part for each group of rows that every processor treats alike."""
    lengths = [len(prompt) for prompt in requests.prompts]
    looks = any(name in strategy.processed for name in LOOKING)
    forced = "forced_eos_token_id" in strategy.processed
    alike: dict[tuple[int, int], list[int]] = {}
    for row, (length, max_new_tokens) in enumerate(zip(lengths, requests.max_new_tokens, strict=True)):
        key = (length if looks else requests.width, max_new_tokens if forced else requests.new_columns)
        alike.setdefault(key, []).append(row)
    for (length, max_new_tokens), rows in alike.items():
        begin = requests.width - length
        selected = None if len(alike) == 1 else torch.tensor(rows, device=tokens.device)
        prompts = tokens[:, begin : requests.width]
        prompts = prompts if selected is None else prompts[selected]
        yield _Part(selected, begin, processors(strategy, config, prompts, max_new_tokens))


def processors(
    strategy: Strategy, config: PretrainedConfig, prompts: Tensor, max_new_tokens: int
) -> LogitsProcessorList:
    """transformers' logits processors, as its `generate` builds them for `prompts` [B, P] and so many new tokens.

    Raises ValueError.
    """
    fields = {**dict.fromkeys(PROCESSED), **copy.deepcopy(strategy.processed)}
    if fields["min_new_tokens"]:
        fields["min_length"] = None
    length = prompts.shape[1]
    generation_config = GenerationConfig(
        **fields,
        do_sample=strategy.samples,
        max_length=length + max_new_tokens,
        eos_token_id=strategy.ends or None,
    )
    ends = torch.tensor(strategy.ends, device=prompts.device) if strategy.ends else None
    generation_config._eos_token_tensor = ends
    return _Host(config)._get_logits_processor(
        generation_config=generation_config,
        input_ids_seq_length=length,
        encoder_input_ids=prompts,
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(),
        device=prompts.device,
        model_kwargs={},
    )


def stretch_starts(strategy: Strategy, requests: Requests) -> set[int]:
    """The numbers of new tokens at which some processor begins to act differently."""
    fields, lengths = strategy.processed, {len(prompt) for prompt in requests.prompts}
    sequences = [
        *fields.get("bad_words_ids", []),
        *(sequence for sequence, _ in fields.get("sequence_bias", [])),
    ]
    # tokens, with those of the prompt, from which on a processor acts
    context_lengths = [len(sequence) - 1 for sequence in sequences]
    context_lengths += [fields[name] for name in ("min_length", "no_repeat_ngram_size") if name in fields]
    numbers = {context - length for context in context_lengths for length in lengths}
    if "min_new_tokens" in fields:
        numbers.add(fields["min_new_tokens"])
    if "exponential_decay_length_penalty" in fields:
        numbers.add(fields["exponential_decay_length_penalty"][0] + 1)
    if "begin_suppress_tokens" in fields:
        numbers |= {1, 2}
    if "forced_eos_token_id" in fields:
        numbers |= {
            max_new_tokens - before for max_new_tokens in requests.max_new_tokens for before in (0, 1)
        }
    return {number for number in numbers if number > 0}
