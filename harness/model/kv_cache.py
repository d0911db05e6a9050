"""The KV cache: its kinds, and the bytes in it."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, PretrainedConfig, QuantizedCache, StaticCache
from transformers.cache_utils import CacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from harness.config.settings import Refusal
from harness.ledger.owners import cache_claims
from harness.ledger.tensors import device_of, tensors_in

STATES = ("conv_states", "recurrent_states")
"""The attributes in which a linear attention layer keeps its state."""

GROUP = 64
"""Elements that share a scale and a shift with 4 and 2 bits: transformers' `q_group_size`."""


@dataclass(frozen=True)
class KvBytes:
    """Bytes of a cache; `reserved` >= `filled` >= `live`."""

    reserved: int
    """Every storage of its layers, with the 8-byte counter of each static layer."""
    filled: int
    """Bytes of cached positions, padding included."""
    live: int
    """Bytes of cached positions without padding."""
    positions: int
    """Number of positions that the model has processed, padding included, over the whole batch."""
    pinned: int = 0
    """The part of `reserved` without keys or values that cannot be freed: they are views of a larger storage."""
    state: int = 0
    """The part of `reserved` that does not grow with the sequence: linear attention states."""
    host: int = 0
    """The part of `reserved` in host memory while the model is on another device."""

    @property
    def per_token(self) -> int | None:
        """Measured bytes for each position, all layers together; None before the first position."""
        return self.filled // self.positions if self.positions else None


def make(kind: str, config: PretrainedConfig, length: int, bits: int = 8) -> Cache | None:
    """Create an empty cache of one `kind`:

    - "dynamic" grows by copying itself at every token;
    - "static" allocates `length` positions of each sequence at its first use;
    - "quantized" grows, with so many `bits` for each element: 8 as a float with one scale for all; 4 or 2 in groups
      of 64 with a scale and a shift each, and the last 127 tokens unquantized;
    - "offloaded" is a dynamic cache in host memory; two layers are on the device while they are used;
    - "none" is None.

    Raises Refusal where this model or machine does not support the cache, ValueError for an unknown `kind`.
    """
    if kind == "none":
        return None
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=length)
    if kind == "offloaded":
        return DynamicCache(config=config, offloading=True)
    if kind == "quantized":
        return _quantized(config, bits)
    raise ValueError(f"kind={kind!r}: a cache is one of dynamic, static, quantized, offloaded, none")


def _quantized(config: PretrainedConfig, bits: int) -> Cache:
    options: dict[str, Any] = {"backend": "fp8"} if bits == 8 else {"backend": "quanto", "nbits": bits}
    try:
        return QuantizedCache(config=config, **options)
    except ImportError:
        remedy = f"{bits} bits need optimum-quanto; pip install 'harness[quantized]', or use generation.cache_bits=8"
        raise Refusal("generation.cache_bits", bits, remedy) from None
    except ValueError as error:
        if "backend" in str(error):
            remedy = "this transformers has no cache of 8 bits; use generation.cache_bits=4, or a newer one"
            raise Refusal("generation.cache_bits", bits, remedy) from None
        remedy = f"transformers has none for {config.model_type}, which has other layers than full attention"
        raise Refusal("generation.cache", "quantized", f"{remedy}; use dynamic or static") from None


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int | None:
    """Bytes of one token's keys and values: 2 x layers x KV heads x head dimension x itemsize.

    As in Kwon et al. 2023 (PagedAttention, arXiv 2309.06180, section 3), with KV heads instead of all heads for
    grouped-query attention. None for models to which the formula does not apply: with sliding windows, latent or
    linear attention, cross-attention layers, a different config for each layer, or no cache at all.
    """
    text = config.get_text_config(decoder=True)
    irregular = getattr(text, "is_heterogeneous", False) or getattr(text, "cross_attention_layers", None)
    if irregular or not _caches(config):
        return None
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    windowed = getattr(text, "sliding_window", None) and "layer_types" not in vars(text)
    no_heads = getattr(text, "num_attention_heads", None) is None
    if no_heads or windowed or set(kinds) != {"full_attention"} or getattr(text, "kv_lora_rank", None):
        return None
    return int(text.num_hidden_layers * layer_bytes_per_token(config, dtype))


def layer_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in a layer with KV heads of its own."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1  # Falcon's and GPT-BigCode's field for multi-query attention
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * heads * width * dtype.itemsize)


def _caches(config: PretrainedConfig) -> bool:
    """Whether transformers' model class for `config` accepts a cache. A text sub-config has no class; it
    counts as yes.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    parameters = inspect.signature(model.forward).parameters
    return "past_key_values" in parameters and bool(model._supports_default_dynamic_cache())


def check_kind(kind: str, config: PretrainedConfig, bits: int = 8, ranks: int = 1) -> None:
    """Raise Refusal for a cache that a model of `config` does not support, before the model is built.

    So many `ranks` (tp_size) share each layer's heads.
    """
    if kind == "none":
        return
    if not _caches(config):
        remedy = f"{config.model_type} keeps a state of another kind; use generation.cache=none"
        raise Refusal("generation.cache", kind, remedy)
    if kind != "paged":
        try:
            make(kind, config, 1, bits)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # an unsupported kind of layer
            remedy = f"transformers makes none for {config.model_type} ({type(error).__name__}: {error})"
            raise Refusal("generation.cache", kind, f"{remedy}; use generation.cache=dynamic") from error
    if kind == "quantized" and bits < 8:
        _check_groups(config, bits, ranks)


def _check_groups(config: PretrainedConfig, bits: int, ranks: int) -> None:
    """Raise Refusal where an optimum-quanto group would span two tokens: prompts of some lengths could not be
    quantized.
    """
    if kv_bytes_per_token(config, torch.int8) is None:
        return
    elements = layer_bytes_per_token(config, torch.int8) // 2 // ranks
    if elements % GROUP:
        remedy = (
            f"{bits} bits go in groups of {GROUP}, and a token's keys have {elements} elements in a layer of a rank; "
            "use generation.cache_bits=8"
        )
        raise Refusal("generation.cache_bits", bits, remedy)


def check_bits(bits: int, device: torch.device) -> None:
    """Raise Refusal where torch or a compiler does not support so many bits on `device`.

    optimum-quanto compiles its unpack kernel for 4 and 2 bits here, unless it is already compiled.
    """
    if bits == 8:
        if not saturates(device):
            remedy = (
                "a value larger than all in the prompt becomes NaN with this torch (pytorch#178817); "
                "use torch 2.13, or generation.cache_bits=4"
            )
            raise Refusal("generation.cache_bits", bits, remedy)
        return
    try:
        torch.ops.quanto.unpack(torch.zeros(1, dtype=torch.uint8, device=device), bits)
    except Exception as error:  # a missing or incompatible compiler raises errors of many types
        remedy = (
            f"optimum-quanto compiles what unpacks {bits} bits, and could not here ({str(error)[:200]}); "
            "install a C++ compiler and ninja, or use generation.cache_bits=8"
        )
        raise Refusal("generation.cache_bits", bits, remedy) from error


def saturates(device: torch.device) -> bool:
    """Whether a number too large for fp8 becomes the largest fp8 number; before torch 2.13 it may become NaN.

    An 8-bit cache takes its scale from the prompt alone, so later values can be too large.
    """
    large = torch.full((64,), 2.0**16, device=device)  # enough elements for a vectorized kernel
    return bool(large.to(torch.float8_e4m3fn).float().isfinite().all())


def attention_flops_per_position(config: PretrainedConfig) -> int | None:
    """FLOPs of a new token for each position it attends to: 2 x 2 x layers x heads x head dimension.

    A multiplication and an addition for each element of the score and of the weighted sum of values. None as for
    `kv_bytes_per_token`.
    """
    if kv_bytes_per_token(config, torch.float32) is None:
        return None
    text = config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(4 * text.num_hidden_layers * text.num_attention_heads * width)


def kv_bytes(cache: Cache, rows: Sequence[int] | None = None, device: torch.device | None = None) -> KvBytes:
    """Measure `cache` of a model on `device`.

    `rows` has each sequence's number of tokens without padding; None where nothing is padded. Reads a static cache's
    counter on the device, and so synchronises with it.
    """
    tensors = [tensor for _, _, tensor in cache_claims(cache)]
    on_accelerator = device is not None and str(device) != "cpu"
    host = [tensor for tensor in tensors if on_accelerator and device_of(tensor) == "cpu"]
    positions = filled = live = pinned = state = 0
    for layer in cache.layers:
        state += _storages(_state_of(layer))
        if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
            continue
        sequences, processed, cached, layer_bytes = _layer_usage(layer)
        positions = max(positions, sequences * processed)
        pinned += _storages((layer.keys, layer.values)) - _key_value_bytes(layer)
        filled += layer_bytes
        live_positions = sum(min(row, cached) for row in rows or [cached] * sequences)
        live += layer_bytes * live_positions // (sequences * cached) if cached else 0
    return KvBytes(_storages(tensors), filled, live, positions, pinned, state, _storages(host))


def _layer_usage(layer: CacheLayerMixin) -> tuple[int, int, int, int]:
    """For `layer`: sequences, positions processed in each, positions cached in each, and bytes of all
    cached positions.
    """
    processed, quantized = int(layer.get_seq_length()), getattr(layer, "_quantized_keys", None)
    if quantized is not None:
        packed_keys = quantized if isinstance(quantized, torch.Tensor) else next(tensors_in(quantized))
        cached_bytes = _storages((quantized, layer._quantized_values, layer.keys, layer.values))
        return len(packed_keys), processed, processed, cached_bytes
    sequences, _, capacity, _ = layer.keys.shape
    cached = min(processed, capacity)  # a sliding window drops the oldest
    return sequences, processed, cached, (_key_value_bytes(layer) + _index_bytes(layer)) * cached // capacity


def _key_value_bytes(layer: CacheLayerMixin) -> int:
    """Bytes of keys and values; counted once where both share a storage, as with latent attention."""
    keys, values = layer.keys, layer.values
    if keys.untyped_storage()._cdata == values.untyped_storage()._cdata:
        return min(int(keys.nbytes + values.nbytes), _storages((keys, values)))
    return int(keys.nbytes + values.nbytes)


def _index_bytes(layer: CacheLayerMixin) -> int:
    """Bytes of the index tensors that a sparse attention layer caches beside keys and values."""
    others = {name: value for name, value in vars(layer).items() if name not in (*STATES, "keys", "values")}
    return _storages(tensor for tensor in tensors_in(others) if tensor.is_floating_point())


def _state_of(layer: Any) -> list[Any]:
    """The states of a linear attention layer."""
    return [getattr(layer, name, None) for name in STATES]


def _storages(tree: Iterable[Any]) -> int:
    """Bytes of the storages of all tensors in `tree`, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(list(tree))]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def of_groups(parts: Sequence[KvBytes]) -> KvBytes:
    """The sum over caches of different sequences."""
    return KvBytes(*map(sum, zip(*map(astuple, parts), strict=True)))


def of_stages(parts: Sequence[KvBytes]) -> KvBytes:
    """The sum over caches of the same sequences, each with other layers or other heads."""
    return replace(of_groups(parts), positions=max(part.positions for part in parts))
