"""Generation: prefill, then one token after another. Sequences are padded on the left, so all end together.

B sequences, P columns of prompts, N of new tokens, V words. Every buffer is made once, before the first
token; the loop takes views of them, copies no cache, and waits for the device only to look for an early end.
(transformers itself looks, once a forward: at the mask of a padded batch unless the cache is static, and at
the positions of one that is not padded where there is no cache.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from harness.config.strategy import LIKELIEST, Strategy
from harness.generation import cache_growth, choosing
from harness.generation.batch import Batch, Requests, pad_left
from harness.generation.choosing import Choose, chooser, nobody, telling
from harness.generation.compiled_decode import Compiled
from harness.generation.timestamps import Marks, clock
from harness.ledger import Ledger
from harness.model.kv_cache import KvBytes, kv_bytes, make

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
    show: Show, batch: Batch, columns: Iterable[int], cached: bool, choose: Choose, marks: Marks
) -> None:
    """The new tokens in `columns`, until every sequence has ended, each with a mark.

    Each is made from its sequence's last one; unless that is `cached`, from everything before it.
    """
    for end in columns:
        if batch.done(end):
            break
        next_token(show, batch, end - 1 if cached else 0, end, choose)
        marks.mark()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    requests: Requests,
    strategy: Strategy = LIKELIEST,
    *,
    cache: str | Compiled = "dynamic",
    bits: int = 8,
    ledger: Ledger,
    step: int = 0,
    ends_only: bool = False,
    tell: Callable[[int], object] = nobody,
) -> Generated:
    """Continue each of `requests`, its tokens chosen by `strategy`; `tell` is told of so many after each column.

    `model` is in eval mode, `cache` a kind that `harness.model.kv_cache.make` knows, of so many `bits`; or a
    `Compiled` of `model`, whose own is static and stays there for the next batch. Unless they are drawn, tokens are
    those that transformers' `generate` gives each prompt alone. `ledger` sees a prefill and a decode,
    as `step`; with `ends_only`, only the first and last tokens of each stretch of the decode, and what is generated
    means nothing.
    """
    kept, compiling = cache if isinstance(cache, str) else None, 0.0
    if isinstance(cache, Compiled):
        with ledger.phase("compile", step):
            kept, compiling = cache.prepare(len(requests.prompts))
    with ledger.phase("prefill", step):
        batch, held = ready(requests, strategy, kept, bits, model.config, model.device, ledger)
        chosen = telling(chooser(strategy, requests, batch.tokens, model.config, ledger), tell)
        show = shown_to(model, held)
        marks = Marks(model.device)
        started = clock(model.device)
        prefill(show, batch, chosen)
        marks.mark()
        first = clock(model.device)
    columns: Iterable[int] = range(batch.width + 1, batch.tokens.shape[1])
    if ends_only and cache_growth.can_advance(held):
        columns = ends(requests, strategy, held, ledger)
    with ledger.phase("decode", step):
        if isinstance(cache, Compiled):
            show = cache.shown(batch.mask)
        decode_n_tokens(show, batch, columns, held is not None, chosen, marks)
        last = clock(model.device)
        tokens, measured = finish(requests, batch, held, strategy.ends)
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
    requests: Requests,
    strategy: Strategy,
    cache: str | Cache,
    bits: int,
    config: PretrainedConfig,
    device: torch.device,
    ledger: Ledger,
) -> tuple[Batch, Cache | None]:
    """`requests` as a batch, and an empty cache for it, `cache` or one of that kind: what `ledger` is told of."""
    batch = pad_left(requests, strategy.ends, device)
    for name in ("tokens", "mask", "positions", "ended", "most", "eos"):
        if (tensor := getattr(batch, name)) is not None:
            ledger.claim("inputs", name, tensor)
    held = make(cache, config, requests.shown, bits) if isinstance(cache, str) else cache
    ledger.own(cache=held)
    return batch, held


def ends(requests: Requests, strategy: Strategy, cache: Cache | None, ledger: Ledger) -> Iterator[int]:
    """The columns at the ends of each stretch of a decode; before each `cache` grows by what was left out."""
    first, room = requests.width, requests.room
    bent = cache_growth.bends(cache, first, room) | choosing.bends(strategy, requests)
    columns = range(first + 1, first + room)
    for column, skipped in cache_growth.ends(columns, {first + number for number in bent}, ledger):
        if skipped:
            grow(cache, ledger, skipped)
        yield column


def grow(cache: Cache | None, ledger: Ledger, tokens: int) -> None:
    """Let `cache` be as after so many more tokens, and `ledger` know what it then holds, as after any forward."""
    with ledger.uncounted():
        cache_growth.advance(cache, tokens)
    ledger.own(cache=cache)


def finish(
    requests: Requests, batch: Batch, cache: Cache | None, eos: Sequence[int]
) -> tuple[list[list[int]], KvBytes | None]:
    """The new tokens of each of `requests`, up to its end, and what `cache` came to hold."""
    rows = batch.tokens[:, batch.width :].tolist()
    tokens = [_until(eos, row[:most]) for row, most in zip(rows, requests.most, strict=True)]
    return tokens, None if cache is None else _measure(cache, requests, tokens, batch.tokens.device)


def _measure(
    cache: Cache, requests: Requests, tokens: Sequence[Sequence[int]], device: torch.device
) -> KvBytes:
    """What `cache` holds; a sequence's last token is in it only if the model was shown more after it."""
    before = requests.width - int(cache.get_seq_length())
    pairs = zip(requests.prompts, tokens, strict=True)
    real = [min(len(prompt) + len(new), len(prompt) - before) for prompt, new in pairs]
    return kv_bytes(cache, real, device)


def _until(eos: Sequence[int], row: list[int]) -> list[int]:
    """`row` up to its first token in `eos`, that one included."""
    return row[: next((place + 1 for place, token in enumerate(row) if token in eos), len(row))]
