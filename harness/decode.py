"""Generation: prefill, then one token after another. Sequences are padded on the left, so all end together.

B sequences, P columns of prompts, N of new tokens, V words. Every buffer is made once, before the first
token; the loop takes views of them, copies no cache, and waits for the device only to look for an early end.
(transformers itself looks, once a forward: at the mask of a padded batch unless the cache is static, and at
the positions of one that is not padded where there is no cache.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Cache,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from harness.cache import KvBytes, advance, can_advance, kv_bytes, make
from harness.clock import Marks, clock
from harness.compiled import Compiled
from harness.ledger import Ledger
from harness.skipped import Turns, filled_in

PADDING = 0
"""The id in padded places. It is masked: any id in the vocabulary would do."""

LOOK_EVERY = 16
"""Tokens between looks at whether every sequence has ended, where the host must wait to look."""

FIRST_AND_LAST = 4
"""Tokens at each end of a decode of which only the ends are wanted."""

Choose = Callable[[Tensor, int], Tensor]
"""From logits [B, V] in fp32 for the new token of this number (0 is the first) to that token, [B]."""


@dataclass(frozen=True)
class Batch:
    """Prompts, the room for what follows them, and what the model must know to ignore their padding."""

    tokens: Tensor  # [B, P + N] int64
    mask: Tensor | None  # [B, P + N] int64, 0 on padding; None where nothing is padded
    positions: Tensor  # [B, P + N] int64, counted from each prompt's first token
    ended: Tensor  # [B] bool
    most: (
        Tensor | None
    )  # [B] int64, new tokens of each; None where none may end before the others, or all are alike
    eos: Tensor  # [E] int64, empty where nothing ends a sequence
    width: int  # P

    def write(self, token: Tensor, column: int) -> None:
        """Put `token` [B] into `column`. What follows a sequence's end is cut off when all is done."""
        self.tokens[:, column] = token
        if len(self.eos):
            self.ended.logical_or_(torch.isin(token, self.eos))
        if self.most is not None:
            self.ended.logical_or_(self.most <= column + 1 - self.width)

    def done(self, column: int) -> bool:
        """Whether every sequence has ended before `column`; asked rarely where the answer is a wait."""
        rarely = self.ended.device.type != "cpu" and (column - self.width) % LOOK_EVERY
        return bool(len(self.eos)) and not rarely and bool(self.ended.all())


Show = Callable[[Batch, int, int], Tensor]
"""From columns of a batch, the first and the one after the last, to the logits of the last, [B, V]."""


@dataclass(frozen=True)
class Generated:
    """What came of a batch. `tokens` has no padding, and nothing after a sequence's end."""

    tokens: list[list[int]]
    prefill_seconds: float
    decode_seconds: float
    kv: KvBytes | None
    waited_seconds: float = 0.0  # of these, for other stages
    compile_seconds: float = 0.0  # before them
    began: float = 0.0  # a moment, as are all in `moments`
    moments: Sequence[Sequence[float]] = ()  # by sequence, those at which its tokens came
    computed: int = 0  # new tokens of all sequences, those after their ends too


def greedy(logits: Tensor, number: int) -> Tensor:
    """The likeliest token."""
    return logits.argmax(dim=-1)


def draws(seed: int, sequences: Sequence[int], max_new_tokens: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) for `sampler`, [B, N] fp32: a row for each sequence, a column for each token.

    `sequences` are their numbers in the whole run. A row depends on `seed` and its number alone: on no
    neighbour, rank or device.
    """
    rows = [np.random.default_rng((seed, number)).random(max_new_tokens, np.float32) for number in sequences]
    return torch.tensor(np.stack(rows), device=device)


def sampler(uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Choose:
    """Draw, by `uniform` [B, N], from what temperature, top-k (0: off) and then top-p (1: off) leave."""
    warp = LogitsProcessorList()
    if temperature != 1.0:
        warp.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warp.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warp.append(TopPLogitsWarper(top_p))

    def choose(logits: Tensor, number: int) -> Tensor:
        up_to = warp(None, logits).softmax(dim=-1).cumsum(dim=-1)  # [B, V]
        threshold = uniform[:, number, None] * up_to[:, -1:]  # [B, 1]; the sum is only nearly 1
        return torch.searchsorted(up_to, threshold, right=True).squeeze(-1)

    return choose


def pad_left(
    prompts: Sequence[Sequence[int]], most: int | Sequence[int], eos: Sequence[int], device: torch.device
) -> Batch:
    """`prompts` of any lengths as one batch with room for `most` new tokens, of all or of each."""
    width, room = max(map(len, prompts)), most if isinstance(most, int) else max(most)
    apart = [] if isinstance(most, int) or len(set(most)) == 1 or not eos else most
    tokens = torch.full((len(prompts), width + room), PADDING)
    mask = torch.ones_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) : width] = torch.tensor(prompt)
        mask[row, : width - len(prompt)] = 0
    positions = (mask.cumsum(dim=-1) - 1).clamp_(min=0)
    padded = any(len(prompt) < width for prompt in prompts)
    return Batch(
        tokens.to(device),
        mask.to(device) if padded else None,
        positions.to(device),
        torch.zeros(len(prompts), dtype=torch.bool, device=device),
        torch.tensor(apart, dtype=torch.int64, device=device) if apart else None,
        torch.tensor(eos, dtype=torch.int64, device=device),
        width,
    )


def shown_to(model: PreTrainedModel, cache: Cache | None) -> Show:
    """What `model` makes of columns of a batch, after those that `cache` knows."""

    def show(batch: Batch, begin: int, end: int) -> Tensor:
        logits: Tensor = model(
            input_ids=batch.tokens[:, begin:end],  # [B, end - begin]
            attention_mask=None if batch.mask is None else batch.mask[:, :end],  # [B, end]
            position_ids=batch.positions[:, begin:end],  # [B, end - begin]
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    return show


def next_token(show: Show, batch: Batch, begin: int, end: int, choose: Choose) -> None:
    """Show columns `begin` to `end`; write what follows them into column `end`."""
    batch.write(choose(show(batch, begin, end).float(), end - batch.width), end)


def prefill(show: Show, batch: Batch, choose: Choose) -> None:
    """All prompts at once; each sequence's first new token."""
    next_token(show, batch, 0, batch.width, choose)


def decode_n_tokens(
    show: Show,
    batch: Batch,
    cached: bool,
    choose: Choose,
    marks: Marks,
    skip: Callable[[int], None] | None = None,
    fill_in: Callable[[Turns], Turns] = iter,
) -> None:
    """The rest of the new tokens, until the room is full or every sequence has ended, each with a mark.

    Each is made from its sequence's last one; unless that is `cached`, from everything before it. With `skip`, of many
    only the first and the last ones, between which it is told how many to let the cache grow by, and `fill_in` is
    given the turns.
    """
    for end, skipped in fill_in(turns(range(batch.width + 1, batch.tokens.shape[1]), skip is not None)):
        if skip is not None and skipped:
            skip(skipped)
        if batch.done(end):
            break
        next_token(show, batch, end - 1 if cached else 0, end, choose)
        marks.mark()


def turns(columns: range, ends_only: bool) -> Turns:
    """Each of `columns`, and how many were left out before it: none, or the middle ones of many."""
    middle = range(columns.start + FIRST_AND_LAST, columns.stop - FIRST_AND_LAST)
    for column in columns:
        if not ends_only or column not in middle:
            yield column, len(middle) if ends_only and column == middle.stop else 0


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    most: int | Sequence[int],
    *,
    cache: str = "dynamic",
    bits: int = 8,
    compiled: Compiled | None = None,
    eos: Sequence[int] = (),
    choose: Choose = greedy,
    ledger: Ledger,
    step: int = 0,
    ends_only: bool = False,
) -> Generated:
    """Continue each of `prompts` (ids, none empty) by up to `most` >= 1 tokens, all or each, ending after any of `eos`.

    `model` is in eval mode, `cache` a kind that `harness.cache.make` knows, of so many `bits`. Greedy tokens are those
    of transformers' `generate` on the same left-padded batch. `ledger` sees a prefill and a decode, as `step`; with
    `ends_only`, only the first and last tokens of the decode, and what is generated means nothing. With `compiled`,
    which is made of `model`, the decode is compiled, and the cache is static and stays there for the next batch.
    """
    kept, compiling = None, 0.0
    if compiled is not None:
        with ledger.phase("compile", step):
            kept, compiling = compiled.prepare(len(prompts))
    with ledger.phase("prefill", step):
        batch, held = ready(prompts, most, kept or cache, bits, eos, model.config, model.device, ledger)
        show = shown_to(model, held)
        marks = Marks(model.device)
        started = clock(model.device)
        prefill(show, batch, choose)
        marks.mark()
        first = clock(model.device)
    skip = partial(grow, held, ledger) if ends_only and can_advance(held) else None
    with ledger.phase("decode", step):
        if compiled is not None:
            show = compiled.shown(batch.mask)
        decode_n_tokens(show, batch, held is not None, choose, marks, skip, partial(filled_in, ledger))
        last = clock(model.device)
        tokens, measured = finish(batch, held, prompts, most, eos)
    ledger.disown(held)
    at = marks.moments()
    return Generated(
        tokens,
        first - started,
        last - first,
        measured,
        compile_seconds=compiling,
        began=started,
        moments=[at[: len(row)] for row in tokens],
        computed=len(tokens) * len(at),
    )


def ready(
    prompts: Sequence[Sequence[int]],
    most: int | Sequence[int],
    cache: str | Cache,
    bits: int,
    eos: Sequence[int],
    config: PretrainedConfig,
    device: torch.device,
    ledger: Ledger,
) -> tuple[Batch, Cache | None]:
    """`prompts` as a batch, and an empty cache for it, `cache` or one of that kind: what `ledger` is told of."""
    batch = pad_left(prompts, most, eos, device)
    for name in ("tokens", "mask", "positions", "ended", "most", "eos"):
        if (tensor := getattr(batch, name)) is not None:
            ledger.claim("inputs", name, tensor)
    room = batch.tokens.shape[1] - 1  # the last token is never shown to the model
    held = make(cache, config, room, bits) if isinstance(cache, str) else cache
    ledger.own(cache=held)
    return batch, held


def grow(cache: Cache | None, ledger: Ledger, tokens: int) -> None:
    """Let `cache` be as after so many more tokens, and `ledger` know what it then holds, as after any forward."""
    with ledger.uncounted():
        advance(cache, tokens)
    ledger.own(cache=cache)


def finish(
    batch: Batch,
    cache: Cache | None,
    prompts: Sequence[Sequence[int]],
    most: int | Sequence[int],
    eos: Sequence[int],
) -> tuple[list[list[int]], KvBytes | None]:
    """The new tokens of each of `prompts`, up to its end, and what `cache` came to hold."""
    rows = batch.tokens[:, batch.width :].tolist()
    limits = [most] * len(rows) if isinstance(most, int) else most
    tokens = [_until(eos, row[:limit]) for row, limit in zip(rows, limits, strict=True)]
    return tokens, None if cache is None else _measure(cache, prompts, tokens, batch.tokens.device)


def _measure(
    cache: Cache, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], device: torch.device
) -> KvBytes:
    """What `cache` holds; a sequence's last token is in it only if the model was shown more after it."""
    shown, width = int(cache.get_seq_length()), max(map(len, prompts))
    real = [min(len(p) + len(n), shown - width + len(p)) for p, n in zip(prompts, tokens, strict=True)]
    return kv_bytes(cache, real, device)


def _until(eos: Sequence[int], row: list[int]) -> list[int]:
    """`row` up to its first token in `eos`, that one included."""
    return row[: next((place + 1 for place, token in enumerate(row) if token in eos), len(row))]
