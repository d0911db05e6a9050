"""Findings about the KV cache, each from figures of the record. It imports no torch."""

from collections.abc import Iterator

from harness.analysis.findings.finding import NOTABLE, Finding, Run
from harness.tables import size


def kv_cache(run: Run) -> Iterator[Finding]:
    """The KV cache is larger than the parameters."""
    cache, parameters = run.highest("kv_cache"), run.highest("parameters")
    if run.record.mode == "infer" and cache > parameters:
        token = run.record.inference.kv_bytes_per_token
        each = f"; it takes {size(token)} for each token of each sequence" if token else ""
        sentence = (
            f"The KV cache grows to {size(cache)}, more than the {size(parameters)} of parameters{each}."
        )
        yield Finding("kv_cache", sentence, cache)


def padding(run: Run) -> Iterator[Finding]:
    """Much of the KV cache is padding, or was never filled."""
    kv = run.record.inference
    if kv.kv_reserved is None or kv.kv_filled is None or kv.kv_live is None:
        return
    not_tokens = (kv.kv_pinned or 0) + (kv.kv_state or 0)
    wasted, unused = kv.kv_filled - kv.kv_live, kv.kv_reserved - kv.kv_filled - not_tokens
    paged = run.settings is not None and run.settings.generation.cache == "paged"
    wasted_are = "are in pages that no token fills yet" if paged else "are padding"
    parts = [f"{size(wasted)} {wasted_are}"] if wasted >= NOTABLE * kv.kv_reserved else []
    parts += [f"{size(unused)} were never filled"] if unused >= NOTABLE * kv.kv_reserved else []
    if parts and kv.kv_reserved > 0:
        sentence = (
            f"Of {size(kv.kv_reserved)} of KV cache {kv.kv_live / kv.kv_reserved:.0%} hold tokens: "
            f"{' and '.join(parts)}."
        )
        yield Finding("padding", sentence, wasted + unused)


def cache_copies(run: Run) -> Iterator[Finding]:
    """A growing cache copies one layer at a time, so part of it exists twice for a moment."""
    reserved, highest = run.record.inference.kv_reserved, run.highest("kv_cache")
    generation = None if run.settings is None else run.settings.generation
    grows = generation is not None and (
        generation.cache == "dynamic" or (generation.cache, generation.cache_bits) == ("quantized", 8)
    )
    if generation is not None and grows and reserved and highest - reserved >= NOTABLE * reserved:
        copied = highest - reserved
        static = " A static cache does not." if generation.cache == "dynamic" else ""
        sentence = (
            f"The {generation.cache} cache copies a layer to add a token: for that moment KV takes {size(highest)}, "
            f"{size(copied)} more than it keeps.{static}"
        )
        yield Finding("cache_copies", sentence, copied)


def pinned(run: Run) -> Iterator[Finding]:
    """Keys and values are views of larger tensors, which stay in memory as a whole."""
    kv = run.record.inference
    if kv.kv_pinned and kv.kv_reserved and kv.kv_pinned >= NOTABLE * kv.kv_reserved:
        sentence = (
            f"Of {size(kv.kv_reserved)} of KV cache {size(kv.kv_pinned)} are no keys or values: those are views of "
            "larger tensors, as where a window is kept of a long prompt, and all of one stays while any of it is used."
        )
        yield Finding("pinned", sentence, kv.kv_pinned)


def state(run: Run) -> Iterator[Finding]:
    """Layers of linear attention keep a state instead of keys and values."""
    kv = run.record.inference
    if kv.kv_state and kv.kv_reserved and kv.kv_state >= NOTABLE * kv.kv_reserved:
        sentence = (
            f"Of {size(kv.kv_reserved)} of KV cache {size(kv.kv_state)} are states of linear attention: as large "
            "for one token of a sequence as for any number."
        )
        yield Finding("state", sentence, kv.kv_state)


def on_host(run: Run) -> Iterator[Finding]:
    """The KV cache is in the host's memory, which no category counts."""
    kv = run.record.inference
    if kv.kv_host and kv.kv_reserved:
        sentence = (
            f"Of {size(kv.kv_reserved)} of KV cache {size(kv.kv_host)} are in the host's memory, and in no "
            f"category here. The device holds {size(run.highest('kv_cache'))} at most: each layer comes and goes "
            "for every token."
        )
        yield Finding("on_host", sentence, kv.kv_host)


CACHED = (kv_cache, padding, pinned, state, on_host, cache_copies)
"""The findings in printing order."""
