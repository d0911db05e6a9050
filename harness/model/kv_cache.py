"""The KV cache: which one, and what it holds."""

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
"""What a layer of linear attention keeps, under these names."""

GROUP = 64
"""Elements that share a scale and a shift in 4 and 2 bits: transformers' `q_group_size`."""


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
    pinned: int = 0
    """What of `reserved` no key or value is in, and cannot be freed: they are views of something larger."""
    state: int = 0
    """What of `reserved` is of one size however long a sequence is: linear attention's."""
    host: int = 0
    """What of `reserved` is in the host's memory, and the model on another device."""

    @property
    def per_token(self) -> int | None:
        """Measured bytes held for each position seen, all layers together; None where none was."""
        return self.filled // self.positions if self.positions else None


def make(kind: str, config: PretrainedConfig, length: int, bits: int = 8) -> Cache | None:
    """An empty cache of one `kind`:

    - "dynamic" grows by copying itself at every token;
    - "static" reserves room for `length` positions of each sequence at its first use;
    - "quantized" grows, and keeps an element in so many `bits`: 8 as a float, with a scale for all; 4 or 2 in groups
      of 64 with a scale and a shift each, the last 127 tokens as they are;
    - "offloaded" is a dynamic one in the host's memory, of which two layers are on the device while they are used;
    - "none" is None.

    Raises Refusal where such a cache cannot be for this model or here, ValueError for another `kind`.
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

    As in Kwon et al. 2023 (PagedAttention, arXiv 2309.06180, section 3), with KV heads for all heads where
    they are grouped. None for models to which it does not apply: with windows, latent or linear attention, layers for
    what is no text, each layer with a config of its own, or no cache at all.
    """
    text = config.get_text_config(decoder=True)
    apart = getattr(text, "is_heterogeneous", False) or getattr(text, "cross_attention_layers", None)
    if apart or not _caches(config):
        return None
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    windowed = getattr(text, "sliding_window", None) and "layer_types" not in vars(text)
    no_heads = getattr(text, "num_attention_heads", None) is None
    if no_heads or windowed or set(kinds) != {"full_attention"} or getattr(text, "kv_lora_rank", None):
        return None
    return int(text.num_hidden_layers * layer_bytes_per_token(config, dtype))


def layer_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in a layer that attends with heads of its own."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1  # Falcon's and GPT-BigCode's word for it
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * heads * width * dtype.itemsize)


def _caches(config: PretrainedConfig) -> bool:
    """Whether transformers' model of `config` takes a cache; of a part of one, as of its text, it is taken to."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    taken = inspect.signature(model.forward).parameters
    return "past_key_values" in taken and bool(model._supports_default_dynamic_cache())


def check_kind(kind: str, config: PretrainedConfig, bits: int = 8, ranks: int = 1) -> None:
    """Refuse a cache that a model of `config` cannot have, before the model is made.

    So many `ranks` share each layer's heads. Raises Refusal.
    """
    if kind == "none":
        return
    if not _caches(config):
        remedy = f"{config.model_type} keeps a state of another kind; use generation.cache=none"
        raise Refusal("generation.cache", kind, remedy)
    if kind != "paged":
        try:
            make(kind, config, 1, bits)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # it knows no such layer
            remedy = f"transformers makes none for {config.model_type} ({type(error).__name__}: {error})"
            raise Refusal("generation.cache", kind, f"{remedy}; use generation.cache=dynamic") from error
    if kind == "quantized" and bits < 8:
        _check_groups(config, bits, ranks)


def _check_groups(config: PretrainedConfig, bits: int, ranks: int) -> None:
    """optimum-quanto's groups may not end within a token: a prompt of any length could not be quantized."""
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
    """Refuse so many bits where torch or a compiler has not what they need on `device`.

    What unpacks 4 and 2 is compiled there, unless it has been. Raises Refusal.
    """
    if bits == 8:
        if not saturates(device):
            remedy = (
                "what is larger than all in a prompt would be no number with this torch (pytorch#178817); "
                "use torch 2.13, or generation.cache_bits=4"
            )
            raise Refusal("generation.cache_bits", bits, remedy)
        return
    try:
        torch.ops.quanto.unpack(torch.zeros(1, dtype=torch.uint8, device=device), bits)
    except Exception as error:  # whatever a compiler that is not there, or another one, comes to
        remedy = (
            f"optimum-quanto compiles what unpacks {bits} bits, and could not here ({str(error)[:200]}); "
            "install a C++ compiler and ninja, or use generation.cache_bits=8"
        )
        raise Refusal("generation.cache_bits", bits, remedy) from error


def saturates(device: torch.device) -> bool:
    """Whether a number that is too large for 8 bits becomes the largest: before torch 2.13 it may become NaN.

    A cache of 8 bits takes its scale from the prompt alone.
    """
    large = torch.full((64,), 2.0**16, device=device)  # as many as a vectorized kernel takes
    return bool(large.to(torch.float8_e4m3fn).float().isfinite().all())


def attention_flops_per_position(config: PretrainedConfig) -> int | None:
    """What a new token takes for each position it attends to: 2 x 2 x layers x heads x head dimension.

    A score and a share of the values, an addition and a multiplication each. None as for `kv_bytes_per_token`.
    """
    if kv_bytes_per_token(config, torch.float32) is None:
        return None
    text = config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(4 * text.num_hidden_layers * text.num_attention_heads * width)


def kv_bytes(cache: Cache, rows: Sequence[int] | None = None, device: torch.device | None = None) -> KvBytes:
    """What `cache` of a model on `device` holds now.

    `rows` are each sequence's tokens that are not padding; None where all are. Reads a static cache's own counter,
    and so waits for the device.
    """
    every = [tensor for _, _, tensor in cache_claims(cache)]
    away = device is not None and str(device) != "cpu"
    host = [tensor for tensor in every if away and device_of(tensor) == "cpu"]
    positions = filled = live = pinned = state = 0
    for layer in cache.layers:
        state += _storages(_state_of(layer))
        if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
            continue
        sequences, seen, kept, held = _kept(layer)
        positions = max(positions, sequences * seen)
        pinned += _storages((layer.keys, layer.values)) - _covered(layer)
        filled += held
        shown = sum(min(row, kept) for row in rows or [kept] * sequences)
        live += held * shown // (sequences * kept) if kept else 0
    return KvBytes(_storages(every), filled, live, positions, pinned, state, _storages(host))


def _kept(layer: CacheLayerMixin) -> tuple[int, int, int, int]:
    """Sequences of `layer`, positions that it saw of each and that it keeps, and the bytes of those it keeps of all."""
    seen, quantized = int(layer.get_seq_length()), getattr(layer, "_quantized_keys", None)
    if quantized is not None:
        whole = quantized if isinstance(quantized, torch.Tensor) else next(tensors_in(quantized))
        held = _storages((quantized, layer._quantized_values, layer.keys, layer.values))
        return len(whole), seen, seen, held
    sequences, _, capacity, _ = layer.keys.shape
    kept = min(seen, capacity)  # a sliding window drops the oldest
    return sequences, seen, kept, (_covered(layer) + _beside(layer)) * kept // capacity


def _covered(layer: CacheLayerMixin) -> int:
    """Bytes that keys and values are in; where both are the same, as of latent attention, once."""
    keys, values = layer.keys, layer.values
    if keys.untyped_storage()._cdata == values.untyped_storage()._cdata:
        return min(int(keys.nbytes + values.nbytes), _storages((keys, values)))
    return int(keys.nbytes + values.nbytes)


def _beside(layer: CacheLayerMixin) -> int:
    """Bytes that a layer of sparse attention keeps of its positions beside keys and values, to find them by."""
    kinds = {name: value for name, value in vars(layer).items() if name not in (*STATES, "keys", "values")}
    return _storages(tensor for tensor in tensors_in(kinds) if tensor.is_floating_point())


def _state_of(layer: Any) -> list[Any]:
    """What linear attention keeps."""
    return [getattr(layer, name, None) for name in STATES]


def _storages(tree: Iterable[Any]) -> int:
    """Bytes of all storages of tensors in `tree`, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(list(tree))]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def of_groups(parts: Sequence[KvBytes]) -> KvBytes:
    """What caches of different sequences hold together."""
    return KvBytes(*map(sum, zip(*map(astuple, parts), strict=True)))


def of_stages(parts: Sequence[KvBytes]) -> KvBytes:
    """What caches of the same sequences hold together, each of other layers or of other heads."""
    return replace(of_groups(parts), positions=max(part.positions for part in parts))
