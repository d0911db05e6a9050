"""Scratch of CUDA's attention kernels, forward and backward."""

from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

import torch

from harness.device.call import Call, Card, Moment, Moments, nbytes, once, up

_HALF = (torch.float16, torch.bfloat16)


class Shape(NamedTuple):
    """Sizes of one attention: batch, heads of queries and of keys, queries, keys, features of a key and of a value."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    features: int
    value_features: int


def _shape(call: Call) -> Shape:
    query, key, value = (call[name].shape for name in ("query", "key", "value"))
    return Shape(query[0], query[1], key[1], query[2], key[2], query[3], value[3])


def _turned(tensor: torch.Tensor) -> tuple[int, ...]:
    """The copy of a tensor that is not contiguous with its heads beside its features, as the kernels read it."""
    return () if tensor.transpose(1, 2).is_contiguous() else (nbytes(tensor),)


def flash(call: Call) -> Moments:
    """Where few blocks of queries would leave the card idle, keys are split and each part's result kept in fp32.

    ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_fwd and set_params_splitkv; not with dropout. One query
    a head is turned into one head of several queries, and its result back: a copy of the output.
    """
    shape = _shape(call)
    single = shape.queries == 1 and shape.heads > shape.key_heads and call["dropout_p"] == 0
    queries, heads = (
        (shape.heads // shape.key_heads, shape.key_heads) if single else (shape.queries, shape.heads)
    )
    turned = (nbytes(call["query"]),) if single else ()
    if call["dropout_p"] > 0:
        return once(*turned)
    blocks = shape.batch * heads * -(-queries // 64)
    tile = 256 if shape.features <= 64 else 128 if shape.features <= 128 else 64
    parts = splits(blocks, -(-shape.keys // tile), call.card)
    if parts is None:
        return None
    if parts == 1:
        return once(*turned)
    row = parts * shape.batch * heads * queries * 4
    return once(*turned, row, row * up(shape.features, 32))


def splits(blocks: int, key_blocks: int, card: Card) -> int | None:
    """Into how many parts the keys are split: the fewest of 85% of the best occupancy (num_splits_heuristic).

    blocks: of 64 queries, over batch and heads. None where the number of multiprocessors is unknown.
    """
    if card.multiprocessors is None:
        return None
    slots = 2 * card.multiprocessors
    if blocks >= 0.8 * slots:
        return 1
    eligible = [
        parts
        for parts in range(1, min(128, slots, key_blocks) + 1)
        if parts == 1 or -(-key_blocks // parts) != -(-key_blocks // (parts - 1))
    ]
    used = {parts: (waves := blocks * parts / slots) / ceil(waves) for parts in eligible}
    return next((parts for parts in eligible if used[parts] >= 0.85 * max(used.values())), 1)


def flash_backward(call: Call) -> Moments:
    """The queries' gradient in fp32, a row sum for each query, and gradients of every head where heads share keys.

    ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd; attention_backward.cu makes the gradient and the
    output contiguous. Deterministic algorithms keep one gradient of the queries for each of several splits.
    """
    shape, size = _shape(call), call["query"].element_size()
    queries = up(shape.queries, 128)
    parts = 1
    if torch.are_deterministic_algorithms_enabled():
        if call.card.multiprocessors is None:
            return None
        parts = -(-call.card.multiprocessors // (shape.batch * shape.heads))
    rows = shape.batch * shape.heads * queries
    accumulated = parts * rows * up(shape.features, 32) * 4
    expanded = shape.batch * shape.keys * shape.heads * shape.features * size
    shared = 2 * (expanded,) if shape.heads != shape.key_heads else ()
    return once(*_turned(call["grad_out"]), *_turned(call["out"]), rows * 4, accumulated, *shared)


def efficient(call: Call) -> Moments:
    """More than 128 features of a value in half precision: the output once more in fp32, between blocks of keys.

    ATen/native/transformers/cuda/attention.cu, mem_eff_attention/kernel_forward.h (kNeedsOutputAccumulatorBuffer).
    """
    shape = _shape(call)
    if call["query"].dtype not in _HALF or shape.value_features <= 128:
        return ()
    return once(shape.batch * shape.queries * shape.heads * shape.value_features * 4)


class Kernel(NamedTuple):
    """A backward kernel: its tile of queries and of keys, and the most features that it takes."""

    queries: int
    keys: int
    features: int


def efficient_backward(call: Call) -> Moments:
    """A sum for each query, and a staging area for the queries' gradient, a tile at a time; in fp32.

    ATen/native/transformers/cuda/attention_backward.cu, mem_eff_attention/kernel_backward.h (workspace_size). In single
    precision the sum is of a product as large as the output. Unknown over 64 features, or 96 in half precision, on
    cards whose shared memory may not fit the tile for more, and over 128 in half precision on all: there the keys'
    gradient is staged too.
    """
    shape, query = _shape(call), call["query"]
    half = query.dtype in _HALF
    kernel = _kernel(max(shape.features, shape.value_features), half, call.card)
    if kernel is None:
        return None
    copied = _turned(call["grad_out_"])
    delta = shape.batch * shape.heads * shape.queries * 4
    tiles = -(-shape.queries // kernel.queries) * -(-shape.features // kernel.keys)
    workspace = shape.batch * shape.heads * tiles * (kernel.queries * kernel.keys + 4) * 4
    after = Moment((*copied, delta, workspace))
    if half:
        return (after,)
    product = shape.batch * shape.queries * shape.heads * shape.value_features * 4
    return (Moment((*copied, product, delta, delta)), after)


def _kernel(features: int, half: bool, card: Card) -> Kernel | None:
    """The kernel of capability 8.0 and above that is chosen first: mem_eff_attention/kernels/cutlassB.h."""
    if card.capability < 8:
        return None
    return next((each for each in _kernels(half, card) if features <= each.features), None)


def _kernels(half: bool, card: Card) -> Iterator[Kernel]:
    yield Kernel(64, 64, 32)
    yield Kernel(64, 64, 64)
    large = card.version in ((8, 0), (9, 0), (10, 0), (10, 3))
    if half and card.version in ((8, 6), (8, 9)):
        yield Kernel(128, 64, 96)
    if half and large:
        yield Kernel(128, 128, 128)
    if not half and large:
        yield Kernel(128, 64, 128)
        yield Kernel(128, 64, 65536)
