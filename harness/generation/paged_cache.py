"""The paged KV cache: how many pages a run needs, and what the cache holds. transformers allocates and assigns the
pages.

A page here holds `page_size` tokens in every layer (transformers calls that a block, and calls one layer's part of it a
page). Layers with a sliding window have pages of their own. So memory is handed out in sectors: a number of bytes that
every kind of layer can divide into whole pages.
"""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, lcm
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from harness.config.rules.generation import STATIC
from harness.config.settings import Generation, Refusal
from harness.data.prompts import Prompt
from harness.model.kv_cache import KvBytes, layer_bytes_per_token

CHUNK = 512
"""Tokens in one forward where more are waiting, if all prompts are shorter."""

ALIGNMENT = 128
"""transformers rounds a sector up to a multiple of so many bytes."""

CONTINUOUS_BATCHING = "transformers.generation.continuous_batching"


class Limits(NamedTuple):
    """The limits of a paged run, set before it begins: transformers' own defaults would fill the machine's memory."""

    max_num_seqs: int
    """Requests that run at the same time."""
    num_blocks: int
    """Pages in all."""
    block_size: int
    """Tokens in a page."""
    max_num_batched_tokens: int
    """Tokens in one forward."""


class Paged(NamedTuple):
    """The scheduler's figures over all forwards of a rank."""

    forwards: int
    tokens: int
    """Input tokens of all forwards."""
    evicted: int
    """How often a request lost its pages to others and was started again."""
    pages: int
    pages_used: int
    """The largest number of pages in use at one time."""


def limits_of(
    generation: Generation, config: PretrainedConfig, dtype: torch.dtype, prompts: Sequence[Prompt]
) -> Limits:
    """The limits for these prompts. Without `generation.pages` there are enough pages for the longest request in every
    slot.

    A forward then takes the longest prompt and one token of each other request, or `CHUNK` tokens where that is more.

    Raises Refusal where the pages are too few for a single request, or where transformers has no pages for a kind of
    layer.
    """
    max_num_seqs, size = min(generation.batch, len(prompts)), generation.page_size
    # minus 1: the last token is never an input
    longest = max(len(prompt.tokens) + prompt.max_new_tokens - 1 for prompt in prompts)
    longest_prompt = max(len(prompt.tokens) for prompt in prompts)
    minimum = pages(config, dtype, size, 1, longest)
    if generation.pages is not None and generation.pages < minimum:
        remedy = (
            f"the longest request has {longest} tokens; use {minimum} or more, or larger pages than {size}"
        )
        raise Refusal("generation.pages", generation.pages, remedy)
    return Limits(
        max_num_seqs,
        generation.pages or pages(config, dtype, size, max_num_seqs, longest),
        size,
        generation.batch_tokens
        or min(max_num_seqs * longest_prompt, max(longest_prompt + max_num_seqs - 1, CHUNK)),
    )


def pages(config: PretrainedConfig, dtype: torch.dtype, size: int, requests: int, longest: int) -> int:
    """Pages of `size` tokens that always suffice for so many `requests` of `longest` tokens. Raises Refusal."""
    text = config.get_text_config(decoder=True)
    layer_bytes = layer_bytes_per_token(config, dtype) * size
    kinds = layers(config)
    sector = lcm(*(len(layer_numbers) * layer_bytes for layer_numbers in kinds.values()), ALIGNMENT)
    sectors = 0
    for kind, layer_numbers in kinds.items():
        cached_tokens = longest if kind == "full_attention" else min(longest, text.sliding_window)
        sectors += ceil(
            requests * ceil(cached_tokens / size) / (sector // (len(layer_numbers) * layer_bytes))
        )
    page_count: int = ceil(sectors * sector / (text.num_hidden_layers * layer_bytes))
    return page_count


def layers(config: PretrainedConfig) -> Mapping[str, Sequence[int]]:
    """The numbers of the layers of `config` by kind of page. Raises Refusal where transformers has no pages for one."""
    if importlib.util.find_spec(f"{CONTINUOUS_BATCHING}.cache_allocators") is None:
        remedy = "this transformers has another paged cache; install transformers>=5.23"
        raise Refusal("generation.batching", "continuous", remedy)
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    try:
        layer_groups: Mapping[str, Sequence[int]] = group_layers_by_attn_type(
            config.get_text_config(decoder=True)
        )
    except ValueError as error:
        reason = f"transformers' paged cache does not support a layer of {config.model_type} ({error})"
        raise Refusal("generation.batching", "continuous", f"{reason}; use {STATIC}") from error
    return layer_groups


@dataclass
class Usage:
    """The size of a PagedAttentionCache at the time when most pages were in use."""

    cache: Any
    peak: KvBytes | None = None

    def look(self, tokens: Iterable[int]) -> None:
        """Measure the cache while requests are in it; `tokens` has the input tokens of each request so far."""
        token_counts, filled, live = list(tokens), 0, 0
        for kind in self.cache.cache_allocators.values():
            filled += sum(map(len, kind.block_table.values())) * kind.bytes_per_block
            window = getattr(kind, "sliding_window", None)
            live_tokens = (
                sum(token_counts) if window is None else sum(min(count, window) for count in token_counts)
            )
            live += live_tokens * (kind.bytes_per_block // kind.tokens_per_page)
        if self.peak is None or (filled, live) > (self.peak.filled, self.peak.live):
            self.peak = KvBytes(self.cache.cache_tensor.nbytes, filled, live, sum(token_counts))

    @property
    def free(self) -> int:
        """Free pages, each with room in every layer."""
        return int(self.cache.compute_free_capacity(relative=False) // self._page)

    @property
    def used(self) -> int:
        """The largest number of pages in use. Pages of layers with a window count by their bytes."""
        return 0 if self.peak is None else ceil(self.peak.filled / self._page)

    @property
    def _page(self) -> int:
        return sum(int(kind.bytes_per_block) for kind in self.cache.cache_allocators.values())
