"""The KV cache: which one, and what it holds."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from transformers import Cache, DynamicCache, PretrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from harness.ledger.owners import cache_claims


@dataclass(frozen=True)
class KvBytes:
    """Bytes of a cache, from the outside in: `reserved` >= `filled` >= `live`."""

    reserved: int
    """Every storage that its layers hold; 8 bytes a layer of a static cache are its own counter."""
    filled: int
    """Positions that it keeps, padding included."""
    live: int
    """Positions that it keeps for a token of a prompt or of its continuation."""
    positions: int
    """Positions that the model was shown, padding included, over the whole batch."""

    @property
    def per_token(self) -> int | None:
        """Measured bytes held for each position seen, all layers together; None where none was."""
        return self.filled // self.positions if self.positions else None


def make(kind: str, config: PretrainedConfig, length: int) -> Cache | None:
    """An empty cache: "dynamic" grows by copying itself at every token, "static" reserves room for `length`
    positions of each sequence at its first use, and "none" is None.

    Raises ValueError for another `kind`.
    """
    if kind == "none":
        return None
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=length)
    raise ValueError(f"kind={kind!r}: a cache is one of dynamic, static, none")


def can_advance(cache: Cache | None) -> bool:
    """Whether `advance` knows every layer of `cache`."""
    return cache is None or all(type(layer) in (DynamicLayer, StaticLayer) for layer in cache.layers)


def advance(cache: Cache | None, positions: int) -> None:
    """Let `cache` be as long as after `positions` more tokens of each sequence, whatever they would have been.

    It takes no more memory than the last of those tokens would have: for a rehearsal, whose tokens mean nothing.
    """
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.add_(positions)
        else:
            layer.keys = _longer(layer.keys, positions)
            layer.values = _longer(layer.values, positions)


def _longer(tensor: torch.Tensor, positions: int) -> torch.Tensor:
    batch, heads, _, width = tensor.shape
    return torch.cat([tensor, tensor.new_empty(1).expand(batch, heads, positions, width)], dim=-2)


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values: 2 x layers x KV heads x head dimension x itemsize.

    As in Kwon et al. 2023 (PagedAttention, arXiv 2309.06180, section 3), with KV heads for all heads where
    they are grouped. It does not know of layers that keep less: a sliding window, latent or linear attention.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * dtype.itemsize)


def kv_bytes(cache: Cache, rows: Sequence[int] | None = None) -> KvBytes:
    """What `cache` holds now. `rows`: each sequence's tokens that are not padding; None where all are.

    Reads a static cache's own counter, and so waits for the device.
    """
    storages = [tensor.untyped_storage() for _, _, tensor in cache_claims(cache)]
    reserved = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    positions = filled = live = 0
    for layer in cache.layers:
        if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
            continue
        batch, heads, capacity, width = layer.keys.shape
        seen = int(layer.get_seq_length())
        kept = min(seen, capacity)  # a sliding window drops the oldest
        position = heads * (width + layer.values.shape[-1]) * layer.keys.itemsize
        positions = max(positions, batch * seen)
        filled += batch * kept * position
        live += sum(min(row, kept) for row in rows or [kept] * batch) * position
    return KvBytes(reserved, filled, live, positions)


def of_groups(parts: Sequence[KvBytes]) -> KvBytes:
    """What caches of different sequences hold together."""
    return KvBytes(*map(sum, zip(*map(astuple, parts), strict=True)))


def of_stages(parts: Sequence[KvBytes]) -> KvBytes:
    """What caches of the same sequences hold together, each of other layers or of other heads."""
    return replace(of_groups(parts), positions=max(part.positions for part in parts))
