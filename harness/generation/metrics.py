"""Speed of an inference run: tokens per second, latency of requests, and idle time of pipeline stages."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from harness.config.layout import Layout
from harness.generation.paged_cache import Paged
from harness.model.kv_cache import KvBytes, of_stages
from harness.record.results import Idleness, Latency, Percentiles, Performance


class Timing(NamedTuple):
    """Times of requests that were generated together, in seconds. `waited_seconds` is the part spent waiting for other
    stages.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    waited_seconds: float = 0.0
    compile_seconds: float = 0.0  # before the requests start; no other field includes it
    began: float = 0.0  # a timestamp, as are all in `timestamps`
    timestamps: Sequence[Sequence[float]] = ()  # for each request, when each of its tokens was ready
    computed: int = 0  # new tokens that the model computed, with those after an end
    padding: int = 0  # padding tokens in the prompts' columns
    first_seconds: Sequence[
        float
    ] = ()  # for each request, from its first forward to its first token; empty: all as `prefill_seconds`

    @property
    def seconds(self) -> float:
        """From the first prompt to the last token."""
        return self.prefill_seconds + self.decode_seconds


class Finished(NamedTuple):
    """Requests of a rank that have just ended: their number, new tokens and seconds, and their cache's size."""

    prompts: int
    new_tokens: int
    seconds: float
    kv: KvBytes | None


@dataclass
class Share:
    """The results of one rank: new tokens by prompt number, and figures by batch."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    kv: list[KvBytes] = field(default_factory=list)
    paged: list[Paged] = field(default_factory=list)


def of_replicas(shares: Sequence[Share], layout: Layout) -> list[Share]:
    """Merge the ranks' shares into one for each replica. Tokens and times are the last stage's; cache sizes are summed
    over ranks.

    Ranks that share each layer have the same tokens. In a rehearsal only one rank has a share.
    """
    by_replica = [
        [share for rank, share in enumerate(shares) if layout.dp_rank(rank) == dp_rank]
        for dp_rank in range(layout.dp_size)
    ]
    return [
        Share(
            ranks[-1].tokens,
            ranks[-1].timings,
            [of_stages(sizes) for sizes in zip(*(share.kv for share in ranks), strict=True)],
            ranks[-1].paged,
        )
        for ranks in by_replica
        if ranks
    ]


def performance(shares: Sequence[Share], exact: int) -> Performance:
    """Seconds, and tokens per second over all replicas; `shares` has one share for each replica.

    An exact ledger slows the first `exact` batches of a rank. They count only where the rank has no others.
    """
    working = [share for share in shares if share.timings]
    timed = [timing for share in working for timing in _timed(share, exact)]

    def rate(tokens: int, seconds: float) -> float | None:
        return len(working) * tokens / seconds if tokens and seconds else None

    prefill, decode = sum(t.prefill_seconds for t in timed), sum(t.decode_seconds for t in timed)
    new = sum(t.new_tokens for t in timed)
    batches = [t for t in timed if t.sequences]
    first = [seconds for t in batches for seconds in t.first_seconds or [t.prefill_seconds]]
    return Performance(
        tokens_per_second=rate(new, prefill + decode),
        prefill_tokens_per_second=rate(sum(t.prompt_tokens for t in timed), prefill),
        decode_tokens_per_second=rate(new - sum(t.sequences for t in timed), decode),
        time_to_first_token_seconds=statistics.median(first) if first else None,
        generation_seconds=max(sum(t.seconds for t in share.timings) for share in working),
        compile_seconds=max(sum(t.compile_seconds for t in share.timings) for share in working) or None,
        latency=latency([_timed(share, exact) for share in working]),
    )


def latency(shares: Iterable[Sequence[Timing]]) -> Latency:
    """Percentiles of the time to the first token and of the time between tokens, for requests that all arrive at the
    start.

    `shares` has the timings of each replica. None where there are no such times.
    """
    first, between = [], []
    for timings in shares:
        for timing in timings:
            for timestamps in timing.timestamps:
                first += [moment - timings[0].began for moment in timestamps[:1]]
                between += [later - earlier for earlier, later in pairwise(timestamps)]
    return Latency(first_token_seconds=_percentiles(first), between_tokens_seconds=_percentiles(between))


def _percentiles(seconds: Sequence[float]) -> Percentiles | None:
    if not seconds:
        return None
    p50, p95, p99 = map(float, np.percentile(seconds, (50, 95, 99)))
    return Percentiles(p50=p50, p95=p95, p99=p99)


def unasked(shares: Sequence[Share]) -> dict[str, int]:
    """Tokens that were computed without need: those after a request's own end, and padding of prompts."""
    timings = [timing for share in shares for timing in share.timings]
    return {
        "unasked_tokens": sum(timing.computed - timing.new_tokens for timing in timings),
        "padding_tokens": sum(timing.padding for timing in timings),
    }


def idleness(shares: Sequence[Share], layout: Layout, exact: int) -> list[Idleness]:
    """For each stage: seconds at work in one replica, and the fraction of its time that it waits for other stages.

    `shares` are the ranks'. Batches count as in `performance`.
    """
    stage_figures = []
    for number in range(layout.stages):
        of_stage = [shares[rank] for rank in layout.of_stage(number)]
        timed = [_timed(share, exact) for share in of_stage if share.timings]
        seconds = sum(timing.seconds for timings in timed for timing in timings)
        waited = sum(timing.waited_seconds for timings in timed for timing in timings)
        busy = (seconds - waited) / len(timed)
        stage_figures.append(Idleness(stage=number, busy_seconds=busy, idle=waited / seconds))
    return stage_figures


def largest(shares: Sequence[Share]) -> dict[str, int | None]:
    """The size in bytes of a replica's largest cache at the end of its batch, and its positions; None where nothing was
    cached.
    """
    kv_bytes = max((kv for share in shares for kv in share.kv), key=lambda kv: kv.reserved, default=None)
    parts = ("reserved", "filled", "live", "positions", "pinned", "state", "host")
    return {
        "kv_bytes_per_token_measured": None if kv_bytes is None else kv_bytes.per_token,
        **{f"kv_{part}": None if kv_bytes is None else getattr(kv_bytes, part) for part in parts},
    }


def pages(shares: Sequence[Share]) -> dict[str, int]:
    """For the replica with the most pages: their number, and the most in use at one time. Empty without
    a paged cache.
    """
    most = max(
        (paged for share in shares for paged in share.paged), key=lambda each: each.pages, default=None
    )
    return {} if most is None else {"pages": most.pages, "pages_used": most.pages_used}


def scheduled(shares: Sequence[Share]) -> dict[str, Any]:
    """Over all replicas: forwards, mean tokens in a forward, and how often a request was evicted."""
    counts = [paged for share in shares for paged in share.paged]
    forwards = sum(paged.forwards for paged in counts)
    if not forwards:
        return {}
    return {
        "forwards": forwards,
        "tokens_per_forward": sum(paged.tokens for paged in counts) / forwards,
        "evicted": sum(paged.evicted for paged in counts),
    }


def _timed(share: Share, exact: int) -> list[Timing]:
    """Its batches. The first `exact`, which an exact ledger slows, count only where there are no others."""
    return share.timings[exact:] or share.timings
