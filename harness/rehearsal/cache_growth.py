"""How a cache grows during a decode, so that tokens can be left out.

The bytes and the work of a token grow steadily until a sliding window is full, or until a quantized cache packs its
residual: there another stretch begins. The first and last tokens of a stretch determine the rest of it.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from harness.generation.course import Turns
from harness.ledger import Ledger
from harness.rehearsal.extrapolation import filled_in

FIRST_AND_LAST = 4
"""Tokens that are computed at each end of a stretch."""

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
"""The cache layer classes of transformers that `advance` supports; a release may lack some of them."""


def can_advance(cache: Cache | None) -> bool:
    """Whether `advance` supports every layer of `cache`."""
    return cache is None or all(type(layer).__name__ in KNOWN for layer in cache.layers)


def advance(cache: Cache | None, positions: int) -> None:
    """Make `cache` as long as after `positions` more tokens of each sequence, with no real keys and values.

    The tokens lie within one stretch, and the cache has some tokens of it. It takes no more memory than the last of
    those tokens would.
    """
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, StaticLayer):
            _advance_static(layer, positions)
        elif isinstance(layer, DynamicLayer):
            _advance_dynamic(layer, positions)


def _advance_static(layer: Any, positions: int) -> None:
    # a layer with a window also counts on the host
    host_length = getattr(layer, "cumulative_length_int", None)
    if host_length is None or host_length < layer.max_cache_len:
        layer.cumulative_length.add_(positions)
    if host_length is not None:
        layer.cumulative_length_int = host_length + positions


def _advance_dynamic(layer: Any, positions: int) -> None:
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length += positions
    # without residual_length the layer quantizes every token at once
    if hasattr(layer, "_quantized_keys") and not hasattr(layer, "residual_length"):
        for name in ("_quantized_keys", "_quantized_values"):
            elements, scale = getattr(layer, name)
            setattr(layer, name, (_longer(elements, positions), scale))
    elif not layer.is_sliding or layer.keys.shape[-2] < layer.sliding_window - 1:
        layer.keys = _longer(layer.keys, positions)
        layer.values = _longer(layer.values, positions)


def _longer(tensor: torch.Tensor, positions: int) -> torch.Tensor:
    batch, heads, _, width = tensor.shape
    return torch.cat([tensor, tensor.new_empty(1).expand(batch, heads, positions, width)], dim=-2)


def stretch_starts(cache: Cache | None, width: int, tokens: int) -> set[int]:
    """The numbers of the new tokens, out of `tokens` after prompts of `width` tokens, at which a stretch begins; the
    prefill is 0.

    `can_advance` must be true for `cache`. A window of W is full at W - 1 or W positions. A quantized layer packs its
    residual when that is full, and the residual is then empty.
    """
    numbers: set[int] = set()
    for layer in [] if cache is None else cache.layers:
        if getattr(layer, "is_sliding", False):
            window = layer.max_cache_len if isinstance(layer, StaticLayer) else layer.sliding_window
            numbers.update(range(window - width, window - width + 3))
        if residual := getattr(layer, "residual_length", 0):
            numbers.update(number + after for number in range(residual, tokens, residual) for after in (0, 1))
    return numbers


def ends(columns: range, starts: Iterable[int], ledger: Ledger) -> Turns:
    """The `turns` of each stretch of `columns`; a stretch begins at each column in `starts`.

    At the end of each stretch, `ledger` gets the work of the tokens that were left out.
    """
    inner_starts = sorted(column for column in starts if column in columns[1:])
    for begin, end in pairwise([columns.start, *inner_starts, columns.stop]):
        yield from filled_in(ledger, turns(range(begin, end)))


def turns(columns: range) -> Iterator[tuple[int, int]]:
    """The first and last of `columns`, each with the number of columns left out before it."""
    middle = range(columns.start + FIRST_AND_LAST, columns.stop - FIRST_AND_LAST)
    for column in columns:
        if column not in middle:
            yield column, len(middle) if column == middle.stop else 0
