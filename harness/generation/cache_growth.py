"""How a cache grows, so that a rehearsal need not make every token.

What a token takes grows steadily until a window is full, or the room for what is not quantized yet: there another
stretch begins. The first and the last tokens of a stretch tell of all of it.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from harness.generation.extrapolation import Turns, filled_in
from harness.ledger import Ledger

FIRST_AND_LAST = 4
"""Tokens at each end of a stretch of which only the ends are wanted."""

KNOWN = frozenset(
    {
        *("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer"),
        *("Fp8QuantizedLayer", "QuantoQuantizedLayer", "LinearAttentionLayer", "DummyLayer"),
        *("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
        *(
            "LinearAttentionAndStaticFullAttentionLayer",
            "LinearAttentionAndStaticSlidingWindowAttentionLayer",
        ),
    }
)
"""transformers' classes of layers that `advance` knows; a release may lack some of them."""


def can_advance(cache: Cache | None) -> bool:
    """Whether `advance` knows every layer of `cache`."""
    return cache is None or all(type(layer).__name__ in KNOWN for layer in cache.layers)


def advance(cache: Cache | None, positions: int) -> None:
    """Let `cache` be as long as after `positions` more tokens of each sequence, whatever they would have been.

    They lie within one stretch, and the cache has seen some of it. It takes no more memory than the last of those
    tokens would have: for a rehearsal, whose tokens mean nothing.
    """
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, StaticLayer):
            _advance_static(layer, positions)
        elif isinstance(layer, DynamicLayer):
            _advance_dynamic(layer, positions)


def _advance_static(layer: Any, positions: int) -> None:
    seen = getattr(layer, "cumulative_length_int", None)  # a window counts on the host too
    if seen is None or seen < layer.max_cache_len:
        layer.cumulative_length.add_(positions)
    if seen is not None:
        layer.cumulative_length_int = seen + positions


def _advance_dynamic(layer: Any, positions: int) -> None:
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length += positions
    if hasattr(layer, "_quantized_keys") and not hasattr(
        layer, "residual_length"
    ):  # all is quantized at once
        for name in ("_quantized_keys", "_quantized_values"):
            elements, scale = getattr(layer, name)
            setattr(layer, name, (_longer(elements, positions), scale))
    elif not layer.is_sliding or layer.keys.shape[-2] < layer.sliding_window - 1:
        layer.keys = _longer(layer.keys, positions)
        layer.values = _longer(layer.values, positions)


def _longer(tensor: torch.Tensor, positions: int) -> torch.Tensor:
    batch, heads, _, width = tensor.shape
    return torch.cat([tensor, tensor.new_empty(1).expand(batch, heads, positions, width)], dim=-2)


def bends(cache: Cache | None, width: int, tokens: int) -> set[int]:
    """Of `tokens` new ones after prompts of `width`, the numbers at which another stretch begins; the prefill is 0.

    `can_advance` knows every layer of `cache`. A window of W is full at W - 1 or W positions; what is not quantized yet
    is quantized when there are as many tokens as its layer has room for, and then there are none.
    """
    found: set[int] = set()
    for layer in [] if cache is None else cache.layers:
        if getattr(layer, "is_sliding", False):
            window = layer.max_cache_len if isinstance(layer, StaticLayer) else layer.sliding_window
            found.update(range(window - width, window - width + 3))
        if room := getattr(layer, "residual_length", 0):
            found.update(number + more for number in range(room, tokens, room) for more in (0, 1))
    return found


def ends(columns: range, at: Iterable[int], ledger: Ledger) -> Turns:
    """`turns` of each stretch of `columns`, those between the columns `at` which one begins.

    In the end of each `ledger` is told what those left out would take.
    """
    cuts = sorted(column for column in at if column in columns[1:])
    for begin, end in pairwise([columns.start, *cuts, columns.stop]):
        yield from filled_in(ledger, turns(range(begin, end)))


def turns(columns: range) -> Iterator[tuple[int, int]]:
    """The first and the last of `columns`, and how many were left out before each: none, or the middle ones of many."""
    middle = range(columns.start + FIRST_AND_LAST, columns.stop - FIRST_AND_LAST)
    for column in columns:
        if column not in middle:
            yield column, len(middle) if column == middle.stop else 0


def every(columns: range) -> Turns:
    """All of `columns`, none left out before any."""
    return ((column, 0) for column in columns)
