"""Pages: how many a paged cache needs, and what it holds. The pages are transformers' own, and so is who gets them.

A page here has room for `page_size` tokens in every layer (transformers calls that a block, and a page what one layer
has of it). Layers with a sliding window have pages of their own, which is why memory is handed out in sectors: so many
bytes that each kind of layer can cut them into whole pages.
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
"""Tokens in one forward, where more wait, of prompts that are shorter."""

ALIGNMENT = 128
"""Bytes of which transformers makes a sector a multiple."""

ROOM = "transformers.generation.continuous_batching"


class Room(NamedTuple):
    """How much a paged run has, decided before it begins: transformers' own sizes fill the machine's memory."""

    requests: int
    """The most at once."""
    pages: int
    page_size: int
    """Tokens in a page."""
    tokens: int
    """The most in one forward."""


class Paged(NamedTuple):
    """What the scheduler came to, over all forwards of a rank."""

    forwards: int
    tokens: int
    """Shown to the model in them all."""
    evicted: int
    """Times that a request gave up its pages to others, and was begun anew."""
    pages: int
    pages_used: int
    """At most, at once."""


def room(asked: Generation, config: PretrainedConfig, dtype: torch.dtype, prompts: Sequence[Prompt]) -> Room:
    """What `asked` gives these prompts: where it does not say, pages for the longest of them in every place.

    A forward then takes the longest prompt beside a token of each other request, or `CHUNK` tokens where that is more.

    Raises Refusal where the pages are too few for one request alone, or the layers are of a kind that has none.
    """
    places, size = min(asked.batch, len(prompts)), asked.page_size
    longest = max(len(prompt.tokens) + prompt.most - 1 for prompt in prompts)  # the last is never shown
    prompt = max(len(prompt.tokens) for prompt in prompts)
    least = pages(config, dtype, size, 1, longest)
    if asked.pages is not None and asked.pages < least:
        remedy = (
            f"the longest request comes to {longest} tokens; use {least} or more, or larger pages than {size}"
        )
        raise Refusal("generation.pages", asked.pages, remedy)
    return Room(
        places,
        asked.pages or pages(config, dtype, size, places, longest),
        size,
        asked.batch_tokens or min(places * prompt, max(prompt + places - 1, CHUNK)),
    )


def pages(config: PretrainedConfig, dtype: torch.dtype, size: int, requests: int, longest: int) -> int:
    """Pages of `size` tokens that are enough for so many `requests` of `longest` tokens at any time. Raises Refusal."""
    text = config.get_text_config(decoder=True)
    layer = layer_bytes_per_token(config, dtype) * size
    kinds = layers(config)
    sector = lcm(*(len(those) * layer for those in kinds.values()), ALIGNMENT)
    sectors = 0
    for kind, those in kinds.items():
        kept = longest if kind == "full_attention" else min(longest, text.sliding_window)
        sectors += ceil(requests * ceil(kept / size) / (sector // (len(those) * layer)))
    found: int = ceil(sectors * sector / (text.num_hidden_layers * layer))
    return found


def layers(config: PretrainedConfig) -> Mapping[str, Sequence[int]]:
    """The layers of `config` by the kind of their pages. Raises Refusal where transformers has no pages for one."""
    if importlib.util.find_spec(f"{ROOM}.cache_allocators") is None:
        remedy = "the transformers here has another one; install transformers>=5.23"
        raise Refusal("generation.batching", "continuous", remedy)
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    try:
        found: Mapping[str, Sequence[int]] = group_layers_by_attn_type(config.get_text_config(decoder=True))
    except ValueError as error:
        told = f"transformers has no pages for a layer of {config.model_type} ({error})"
        raise Refusal("generation.batching", "continuous", f"{told}; use {STATIC}") from error
    return found


@dataclass
class Held:
    """What a PagedAttentionCache held at the moment of most pages in use."""

    cache: Any
    most: KvBytes | None = None

    def look(self, tokens: Iterable[int]) -> None:
        """Look while requests are in the cache, each with so many of its `tokens` shown to the model."""
        shown, filled, live = list(tokens), 0, 0
        for kind in self.cache.cache_allocators.values():
            filled += sum(map(len, kind.block_table.values())) * kind.bytes_per_block
            window = getattr(kind, "sliding_window", None)
            kept = sum(shown) if window is None else sum(min(each, window) for each in shown)
            live += kept * (kind.bytes_per_block // kind.tokens_per_page)
        if self.most is None or (filled, live) > (self.most.filled, self.most.live):
            self.most = KvBytes(self.cache.cache_tensor.nbytes, filled, live, sum(shown))

    @property
    def free(self) -> int:
        """Pages of every layer that no request has."""
        return int(self.cache.compute_free_capacity(relative=False) // self._page)

    @property
    def used(self) -> int:
        """Pages in use at the moment of most; of layers with a window, as many as their bytes come to."""
        return 0 if self.most is None else ceil(self.most.filled / self._page)

    @property
    def _page(self) -> int:
        return sum(int(kind.bytes_per_block) for kind in self.cache.cache_allocators.values())
