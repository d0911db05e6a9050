"""How fast an inference run was: tokens a second, how long a request waits for tokens, how long a stage for others."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from harness.generation.paged_cache import Paged
from harness.model.kv_cache import KvBytes, of_stages

PERCENTILES = (50, 95, 99)


class Timing(NamedTuple):
    """Requests that were generated together, in seconds; `waited_seconds` of them for other stages."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    waited_seconds: float = 0.0
    compile_seconds: float = 0.0  # before the first of them, and in none of the others
    began: float = 0.0  # a moment, as are all in `moments`
    moments: Sequence[Sequence[float]] = ()  # by request, those at which its tokens came
    computed: int = 0  # new tokens that the model computed, asked for or not
    padding: int = 0  # places in the prompts' columns that hold no token
    first_seconds: Sequence[
        float
    ] = ()  # by request, from its first forward to its first token, where they differ

    @property
    def seconds(self) -> float:
        """From its first prompt to its last token."""
        return self.prefill_seconds + self.decode_seconds


@dataclass
class Share:
    """What one rank did: new tokens by the prompt's number, and figures by batch."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    kv: list[KvBytes] = field(default_factory=list)
    paged: list[Paged] = field(default_factory=list)


def of_replicas(shares: Sequence[Share], replicas: int, tensor: int = 1) -> list[Share]:
    """The ranks' shares as one a replica: the last stage knows tokens and times, and a cache is all ranks' together.

    `tensor` ranks share each layer, and have the same tokens. A rehearsal has one rank's alone.
    """
    of_each = [
        [share for rank, share in enumerate(shares) if rank // tensor % replicas == replica]
        for replica in range(replicas)
    ]
    return [
        Share(
            ranks[-1].tokens,
            ranks[-1].timings,
            [of_stages(each) for each in zip(*(share.kv for share in ranks), strict=True)],
            ranks[-1].paged,
        )
        for ranks in of_each
        if ranks
    ]


def performance(shares: Sequence[Share], exact: int) -> dict[str, Any]:
    """Seconds, and tokens a second over all replicas, of which `shares` are.

    An exact ledger slows a rank's first `exact` batches; they count only where it has no others.
    """
    working = [share for share in shares if share.timings]
    timed = [timing for share in working for timing in _timed(share, exact)]

    def rate(tokens: int, seconds: float) -> float | None:
        return len(working) * tokens / seconds if tokens and seconds else None

    prefill, decode = sum(t.prefill_seconds for t in timed), sum(t.decode_seconds for t in timed)
    new = sum(t.new_tokens for t in timed)
    batches = [t for t in timed if t.sequences]
    first = [seconds for t in batches for seconds in t.first_seconds or [t.prefill_seconds]]
    return {
        "tokens_per_second": rate(new, prefill + decode),
        "prefill_tokens_per_second": rate(sum(t.prompt_tokens for t in timed), prefill),
        "decode_tokens_per_second": rate(new - sum(t.sequences for t in timed), decode),
        "time_to_first_token_seconds": statistics.median(first) if first else None,
        "generation_seconds": max(sum(t.seconds for t in share.timings) for share in working),
        "compile_seconds": max(sum(t.compile_seconds for t in share.timings) for share in working) or None,
        "latency": latency([_timed(share, exact) for share in working]),
    }


def latency(shares: Iterable[Sequence[Timing]]) -> dict[str, dict[str, float] | None]:
    """Percentiles over requests that all wait from the start: seconds to the first token, and from one to the next.

    `shares` are the timings of each replica. None where there is nothing of the kind.
    """
    first, between = [], []
    for timings in shares:
        for timing in timings:
            for moments in timing.moments:
                first += [moment - timings[0].began for moment in moments[:1]]
                between += [later - earlier for earlier, later in pairwise(moments)]
    return {"first_token_seconds": _percentiles(first), "between_tokens_seconds": _percentiles(between)}


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    found = np.percentile(seconds, PERCENTILES)
    return {f"p{each}": float(value) for each, value in zip(PERCENTILES, found, strict=True)}


def unasked(shares: Sequence[Share]) -> dict[str, int]:
    """Tokens that were computed and that nobody asked for: after a request's own end, and padding of its prompt."""
    timings = [timing for share in shares for timing in share.timings]
    return {
        "unasked_tokens": sum(timing.computed - timing.new_tokens for timing in timings),
        "padding_tokens": sum(timing.padding for timing in timings),
    }


def idleness(shares: Sequence[Share], stages: int, exact: int) -> list[dict[str, Any]]:
    """Of every stage, a replica's seconds at work, and the part of all its seconds that it waited for other stages.

    `shares` are the ranks'. Batches count as in `performance`.
    """
    found = []
    replicas = len(shares) // stages
    for number in range(stages):
        of_stage = shares[number * replicas : (number + 1) * replicas]
        timed = [_timed(share, exact) for share in of_stage if share.timings]
        seconds = sum(timing.seconds for timings in timed for timing in timings)
        waited = sum(timing.waited_seconds for timings in timed for timing in timings)
        busy = (seconds - waited) / len(timed)
        found.append({"stage": number, "busy_seconds": busy, "idle": waited / seconds})
    return found


def largest(shares: Sequence[Share]) -> dict[str, int | None]:
    """What the largest cache of a replica held when its batch ended, in bytes, and for how many positions; None where
    nothing was cached."""
    held = max((kv for share in shares for kv in share.kv), key=lambda kv: kv.reserved, default=None)
    parts = ("reserved", "filled", "live", "positions", "pinned", "state", "host")
    return {
        "kv_bytes_per_token_measured": None if held is None else held.per_token,
        **{f"kv_{part}": None if held is None else getattr(held, part) for part in parts},
    }


def pages(shares: Sequence[Share]) -> dict[str, int]:
    """Of the replica with the most pages: how many, and how many of them were in use at once; nothing without pages."""
    held = max(
        (paged for share in shares for paged in share.paged), key=lambda each: each.pages, default=None
    )
    return {} if held is None else {"pages": held.pages, "pages_used": held.pages_used}


def scheduled(shares: Sequence[Share]) -> dict[str, Any]:
    """Of all replicas: forwards, the tokens in one on average, and how often a request gave up its pages for others."""
    found = [paged for share in shares for paged in share.paged]
    forwards = sum(paged.forwards for paged in found)
    if not forwards:
        return {}
    return {
        "forwards": forwards,
        "tokens_per_forward": sum(paged.tokens for paged in found) / forwards,
        "evicted": sum(paged.evicted for paged in found),
    }


def _timed(share: Share, exact: int) -> list[Timing]:
    """Its batches; those that an exact ledger slowed, the first `exact`, only where there are no others."""
    return share.timings[exact:] or share.timings
