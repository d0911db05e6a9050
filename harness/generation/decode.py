"""Generate with a static batch: prefill, then one token after another. Padding is on the left, so all sequences end
together.

B sequences, P columns of prompts, N columns of new tokens, V tokens in the vocabulary. Every buffer is allocated once,
before the first token. The loop takes views of them, copies no cache, and synchronises with the device only to check
for an early end. (transformers itself synchronises once in each forward: on the mask of a padded batch unless the cache
is static, and on the positions of an unpadded batch without a cache.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from harness.config.strategy import LIKELIEST, Strategy
from harness.generation.batch import Batch, Requests, pad_left
from harness.generation.choosing import Choose, chooser, nobody, reporting
from harness.generation.compiled_decode import Compiled
from harness.generation.course import WHOLE, Decoding
from harness.generation.timestamps import Marks, clock
from harness.ledger import Ledger
from harness.model.kv_cache import KvBytes, kv_bytes, make
from harness.runtime import faults

Show = Callable[[Batch, int, int], Tensor]
"""From a batch, a first column and an end column (exclusive) to the logits of the last column, [B, V]."""


@dataclass(frozen=True)
class Generated:
    """The result of a batch. `tokens` has no padding, and nothing after a sequence's end."""

    tokens: list[list[int]]
    prefill_seconds: float
    decode_seconds: float
    kv: KvBytes | None
    waited_seconds: float = 0.0  # the part of these that this stage waited for other stages
    compile_seconds: float = 0.0  # not part of the two above
    began: float = 0.0  # a timestamp, as are all in `timestamps`
    timestamps: Sequence[Sequence[float]] = ()  # for each sequence, when each of its tokens was ready
    computed: int = 0  # new tokens of all sequences, with those after their ends


def shown_to(model: PreTrainedModel, cache: Cache | None) -> Show:
    """The function that runs `model` on columns of a batch, after those in `cache`."""

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
    """Run the model on columns `begin` to `end` and write the next token into column `end`."""
    batch.write(choose(show(batch, begin, end).float(), end - batch.width), end)


def prefill(show: Show, batch: Batch, choose: Choose) -> None:
    """Run all prompts at once and write each sequence's first new token."""
    next_token(show, batch, 0, batch.width, choose)


def decode_n_tokens(
    show: Show, batch: Batch, columns: Iterable[int], cached: bool, choose: Choose, marks: Marks
) -> None:
    """Write the new tokens of `columns` until every sequence has ended; mark a timestamp after each column.

    With a cache (`cached`) the input is only the newest token; without one it is everything before the new token.
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
    course: Decoding = WHOLE,
    report: Callable[[int], object] = nobody,
) -> Generated:
    """Continue each of `requests` with tokens chosen by `strategy`. `report` receives the number of new tokens after
    each column.

    `model` is in eval mode. `cache` is a kind that `harness.model.kv_cache.make` supports, with so many `bits`; or a
    `Compiled` of `model`, whose static cache is reused by the next batch. Unless tokens are sampled, they are those
    that transformers' `generate` gives for each prompt alone. `ledger` records a prefill and a decode as `step`.
    `course` decides which tokens are computed.
    """
    cache_or_kind, compile_seconds = cache if isinstance(cache, str) else None, 0.0
    if isinstance(cache, Compiled):
        with ledger.phase("compile", step):
            cache_or_kind, compile_seconds = cache.prepare(len(requests.prompts))
    with ledger.phase("prefill", step):
        faults.at("prefill", step)
        batch, kv_cache = ready(requests, strategy, cache_or_kind, bits, model.config, model.device, ledger)
        choose = reporting(chooser(strategy, requests, batch.tokens, model.config, ledger), report)
        show = shown_to(model, kv_cache)
        marks = Marks(model.device)
        start_time = clock(model.device)
        prefill(show, batch, choose)
        marks.mark()
        first_token_time = clock(model.device)
    with ledger.phase("decode", step):
        faults.at("decode", step)
        if isinstance(cache, Compiled):
            show = cache.shown(batch.mask)
        columns = _columns(requests, kv_cache, strategy, ledger, course)
        decode_n_tokens(show, batch, columns, kv_cache is not None, choose, marks)
        end_time = clock(model.device)
        tokens, kv = finish(requests, batch, kv_cache, strategy.ends)
    ledger.disown(kv_cache)
    timestamps = marks.timestamps()
    return Generated(
        tokens,
        first_token_time - start_time,
        end_time - first_token_time,
        kv,
        compile_seconds=compile_seconds,
        began=start_time,
        timestamps=[timestamps[: len(row)] for row in tokens],
        computed=len(tokens) * len(timestamps),
    )


def _columns(
    requests: Requests, cache: Cache | None, strategy: Strategy, ledger: Ledger, course: Decoding
) -> Iterator[int]:
    """The columns of the new tokens to compute after the first."""
    for number, skipped in course.turns([(requests, cache)], strategy, ledger):
        course.skip(cache, skipped, ledger)
        yield requests.width + number


def ready(
    requests: Requests,
    strategy: Strategy,
    cache: str | Cache,
    bits: int,
    config: PretrainedConfig,
    device: torch.device,
    ledger: Ledger,
) -> tuple[Batch, Cache | None]:
    """Build the batch of `requests` and an empty cache for it (`cache` itself, or one of that kind), and register both
    with `ledger`.
    """
    batch = pad_left(requests, strategy.ends, device)
    for name in ("tokens", "mask", "positions", "ended", "max_new_tokens", "eos"):
        if (tensor := getattr(batch, name)) is not None:
            ledger.claim("inputs", name, tensor)
    kv_cache = make(cache, config, requests.shown, bits) if isinstance(cache, str) else cache
    ledger.own(cache=kv_cache)
    return batch, kv_cache


def finish(
    requests: Requests, batch: Batch, cache: Cache | None, eos: Sequence[int]
) -> tuple[list[list[int]], KvBytes | None]:
    """The new tokens of each of `requests` up to its end, and the size of `cache`."""
    rows = batch.tokens[:, batch.width :].tolist()
    tokens = [
        _until(eos, row[:max_new_tokens])
        for row, max_new_tokens in zip(rows, requests.max_new_tokens, strict=True)
    ]
    return tokens, None if cache is None else _measure(cache, requests, tokens, batch.tokens.device)


def _measure(
    cache: Cache, requests: Requests, tokens: Sequence[Sequence[int]], device: torch.device
) -> KvBytes:
    """The size of `cache`. A sequence's last token is in it only if the model ran again after that token."""
    not_cached = requests.width - int(cache.get_seq_length())  # negative: new tokens are cached too
    pairs = zip(requests.prompts, tokens, strict=True)
    real_tokens = [min(len(prompt) + len(new), len(prompt) - not_cached) for prompt, new in pairs]
    return kv_bytes(cache, real_tokens, device)


def _until(eos: Sequence[int], row: list[int]) -> list[int]:
    """`row` up to and including its first token in `eos`."""
    return row[: next((index + 1 for index, token in enumerate(row) if token in eos), len(row))]
