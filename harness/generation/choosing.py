"""The next token of each sequence, from logits: what transformers' own processors leave, the likeliest of it or a draw.

B sequences, P columns of prompts, N of new tokens, V words. Each sequence gets what it gets alone: where a processor
looks at tokens, it is shown those of sequences whose prompts are as long, and no padding.
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
"""From logits [B, V] in fp32 for the new token of this number (0 is the first) to that token, [B]."""

LOOKING = (
    *("repetition_penalty", "encoder_repetition_penalty", "sequence_bias", "bad_words_ids"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("min_length", "forced_bos_token_id", "forced_eos_token_id"),
)
"""The fields whose processors look at tokens, or count those of a prompt: padding is none."""


class _Part(NamedTuple):
    """Sequences whose prompts are as long: their rows, or all; where their tokens begin; what is done to logits."""

    rows: Tensor | None
    begin: int
    processors: LogitsProcessorList


class _Host(GenerationMixin):
    """What transformers' `_get_logits_processor` asks of a model."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config


def greedy(logits: Tensor, number: int) -> Tensor:
    """The likeliest token."""
    return logits.argmax(dim=-1)


def nobody(tokens: int) -> None:
    """Is told of tokens."""


def telling(choose: Choose, tell: Callable[[int], object]) -> Choose:
    """`choose`, of which `tell` is told how many tokens it chose."""

    def told(logits: Tensor, number: int) -> Tensor:
        chosen = choose(logits, number)
        tell(len(chosen))
        return chosen

    return told


def draws(seed: int, numbers: Sequence[int], room: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) for `drawn`, [B, N] fp32: a row for each sequence, a column for each token.

    `numbers` are the sequences' in the whole run. A row depends on `seed` and its number alone: on no neighbour, rank
    or device; and a longer one begins with a shorter.
    """
    rows = [np.random.default_rng((seed, number)).random(room, np.float32) for number in numbers]
    return torch.tensor(np.stack(rows), device=device)


def drawn(scores: Tensor, uniform: Tensor) -> Tensor:
    """A token for each row of `scores` [B, V], by `uniform` [B]."""
    up_to = scores.softmax(dim=-1).cumsum(dim=-1)  # [B, V]
    threshold = uniform[:, None] * up_to[:, -1:]  # [B, 1]; the sum is only nearly 1
    return torch.searchsorted(up_to, threshold, right=True).squeeze(-1)


def chooser(
    strategy: Strategy, requests: Requests, tokens: Tensor, config: PretrainedConfig, ledger: Ledger
) -> Choose:
    """What chooses for `requests` by `strategy`; `tokens` [B, P + N] have their prompts, and get what is chosen."""
    if not strategy.processed and not strategy.samples:
        return greedy
    uniform = None
    if strategy.samples:
        uniform = draws(strategy.seed, requests.numbers, requests.room, tokens.device)
        ledger.claim("inputs", "draws", uniform)
    parts = list(_parts(strategy, requests, tokens, config))
    for tensor in (found for part in parts for found in tensors_in((part.rows, *map(vars, part.processors)))):
        ledger.claim("inputs", "logits processors", tensor)

    def choose_for(part: _Part, logits: Tensor, number: int) -> Tensor:
        shown = tokens[:, part.begin : requests.width + number]
        scores: Tensor = part.processors(shown if part.rows is None else shown[part.rows], logits)
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
    """All rows at once, or those that no processor can tell apart."""
    lengths = [len(prompt) for prompt in requests.prompts]
    looks = any(name in strategy.processed for name in LOOKING)
    forced = "forced_eos_token_id" in strategy.processed
    alike: dict[tuple[int, int], list[int]] = {}
    for row, (length, most) in enumerate(zip(lengths, requests.most, strict=True)):
        key = (length if looks else requests.width, most if forced else requests.room)
        alike.setdefault(key, []).append(row)
    for (length, most), rows in alike.items():
        begin = requests.width - length
        chosen = None if len(alike) == 1 else torch.tensor(rows, device=tokens.device)
        prompts = tokens[:, begin : requests.width]
        prompts = prompts if chosen is None else prompts[chosen]
        yield _Part(chosen, begin, processors(strategy, config, prompts, most))


def processors(
    strategy: Strategy, config: PretrainedConfig, prompts: Tensor, most: int
) -> LogitsProcessorList:
    """transformers' own, as its `generate` has them for `prompts` [B, P] and `most` new tokens. Raises ValueError."""
    fields = {**dict.fromkeys(PROCESSED), **copy.deepcopy(strategy.processed)}
    if fields["min_new_tokens"]:
        fields["min_length"] = None
    length = prompts.shape[1]
    asked = GenerationConfig(
        **fields, do_sample=strategy.samples, max_length=length + most, eos_token_id=strategy.ends or None
    )
    ends = torch.tensor(strategy.ends, device=prompts.device) if strategy.ends else None
    asked._eos_token_tensor = ends
    return _Host(config)._get_logits_processor(
        generation_config=asked,
        input_ids_seq_length=length,
        encoder_input_ids=prompts,
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(),
        device=prompts.device,
        model_kwargs={},
    )


def bends(strategy: Strategy, requests: Requests) -> set[int]:
    """The numbers of new tokens from which on some processor does another thing than it did before."""
    fields, lengths = strategy.processed, {len(prompt) for prompt in requests.prompts}
    words = [*fields.get("bad_words_ids", []), *(word for word, _ in fields.get("sequence_bias", []))]
    # tokens, those of a prompt among them, that are enough for a processor
    begins = [len(word) - 1 for word in words]
    begins += [fields[name] for name in ("min_length", "no_repeat_ngram_size") if name in fields]
    found = {begin - length for begin in begins for length in lengths}
    if "min_new_tokens" in fields:
        found.add(fields["min_new_tokens"])
    if "exponential_decay_length_penalty" in fields:
        found.add(fields["exponential_decay_length_penalty"][0] + 1)
    if "begin_suppress_tokens" in fields:
        found |= {1, 2}
    if "forced_eos_token_id" in fields:
        found |= {most - before for most in requests.most for before in (0, 1)}
    return {number for number in found if number > 0}
