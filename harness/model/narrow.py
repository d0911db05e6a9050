"""A small model with a run's own config: the same architecture and settings, but narrow. Checks run on it before the
run.

The config does not say how an architecture treats a cache, a mask or a cut into stages. A model of this size shows it
on the CPU, in well under a second.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TypeVar

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from harness.config.errors import first_line
from harness.model import init_weights
from harness.model.loader import count

T = TypeVar("T")


def _all(width: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), width)


HEADS = {
    **_all(4, "num_attention_heads decoder_attention_heads encoder_attention_heads index_n_heads"),
    **_all(4, "linear_num_heads linear_num_value_heads"),
    **_all(2, "num_key_value_heads num_kv_heads linear_num_key_heads"),
    **_all(8, "num_heads mamba_n_heads mamba_num_heads n_mamba_heads rotary_dim"),
    **_all(16, "kv_lora_rank q_lora_rank v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim"),
    **_all(16, "linear_head_dim linear_key_head_dim linear_value_head_dim"),
    **_all(16, "mamba_d_head mamba_d_state mamba_head_dim mamba_headdim ssm_state_size state_size"),
    **_all(32, "qk_head_dim attention_head_dim"),
}
WINDOWS = _all(4, "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size")
EXPERTS = {
    **_all(4, "moe_num_experts n_routed_experts num_experts num_local_experts"),
    **_all(2, "moe_k moe_topk num_experts_per_tok"),
    **_all(1, "n_group num_expert_group topk_group"),
}
INNER = {
    **_all(96, "intermediate_size intermediate_size_mlp ffn_dim decoder_ffn_dim encoder_ffn_dim"),
    **_all(96, "ffn_hidden_size dense_intermediate_size"),
    **_all(32, "moe_intermediate_size expert_ffn_hidden_size"),
    **_all(32, "shared_intermediate_size shared_expert_intermediate_size"),
}
OUTER = {**_all(64, "hidden_size embedding_dim attention_hidden_size lru_width"), "mamba_d_ssm": 128}
WORDS = _all(128, "vocab_size vocab_size_per_layer_input")
NARROW: Sequence[Mapping[str, int]] = (
    {**WORDS, **INNER, **WINDOWS, **EXPERTS, **HEADS, **OUTER, "head_dim": 16},
    {**WORDS, **INNER, **WINDOWS, **EXPERTS, **HEADS, **OUTER, "attention_hidden_size": 128},
    {**WORDS, **INNER, **WINDOWS, **HEADS, **OUTER},
    {**WORDS, **INNER, **WINDOWS},
    {},
)
"""Widths of the small model, narrowest first; some architectures need more."""

FEWEST = 4
"""The small model has at least so many layers, and more until it has each kind of layer."""

LARGEST = 300_000_000
"""Parameters of the largest model that is tried."""

MOVED = 0.1
"""Standard deviation of the noise added to parameters: large enough to show in bf16."""


class NoneRuns(Exception):
    """No small model of a config runs; the message says why the last one failed."""


def narrowest(
    shape: str,
    dtype: torch.dtype,
    attention: str,
    show: Callable[[PreTrainedModel], T],
    cut: bool = False,
    **more: float,
) -> tuple[PreTrainedModel, T]:
    """The narrowest model of `shape` (its config as JSON) on which `show` succeeds, and the result of `show`.

    With `cut` it has only as many layers as each kind of layer needs. `more` has other config values, set where the
    config has them. Raises NoneRuns.
    """
    fields = json.loads(shape)
    model_type, error_line = fields.pop("model_type"), "each is too large"
    for cut_layers, widths in product((True, False) if cut else (False,), NARROW):
        try:
            config = small(
                AutoConfig.for_model(model_type, **copy.deepcopy(fields)), {**widths, **more}, cut_layers
            )
            if count(init_weights.outline(config, dtype)) > LARGEST:
                continue
            model = made_narrow(config, dtype, attention)
            return model, show(model)
        except Exception as error:  # an architecture that cannot be so narrow may raise any type
            error_line = first_line(error, named=True)
    raise NoneRuns(error_line)


def small(config: PretrainedConfig, widths: Mapping[str, float], cut: bool = False) -> PretrainedConfig:
    """`config` with narrow layers: all of them, or with `cut` the first ones until each kind is among them."""
    small_config = copy.deepcopy(config)
    text = small_config.get_text_config(decoder=True)
    if not any(text is each for each in vars(small_config).values()):
        text = small_config  # for an encoder-decoder config get_text_config returns a copy
    heads = widths.get("num_attention_heads")
    for key in ("num_key_value_heads", "num_kv_heads"):
        if heads is not None and _own(text, key) == _own(text, "num_attention_heads"):
            widths = {**widths, key: heads}
    for key, width in widths.items():
        if _own(text, key) is not None:
            setattr(text, key, width)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if _own(text, key) is not None:
            setattr(text, key, 0)
    if cut:
        _cut(text)
    return small_config


def _own(config: PretrainedConfig, key: str) -> float | None:
    """The number that `config` itself has under this name or its alias in `attribute_map`; None where it has none."""
    value = vars(config).get(config.attribute_map.get(key, key))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cut(text: PretrainedConfig) -> None:
    """Keep the first layers of `text`, enough to have each kind among them."""
    kinds = kinds_of_layers(text)
    count = max(FEWEST, *(kinds.index(kind) + 1 for kind in kinds))
    if count < int(getattr(text, _layers_key(text))):
        keep_layers(text, count)


def kinds_of_layers(text: PretrainedConfig) -> list[str]:
    """What the lists of `text` say of each layer; one empty text where there are no such lists."""
    number = int(getattr(text, _layers_key(text)))
    lists = [value for value in vars(text).values() if _of_layers(value, number)]
    lists += filter(lambda each: _of_layers(each, number), [getattr(text, "layer_types", None)])
    return list(map(str, zip(*lists, strict=True))) or [""]


def keep_layers(text: PretrainedConfig, count: int) -> None:
    """Keep only the first `count` layers of `text`."""
    key = _layers_key(text)
    lists = {name: value for name, value in vars(text).items() if _of_layers(value, getattr(text, key))}
    setattr(text, key, count)
    for name, value in lists.items():
        setattr(text, name, value[:count])


def _layers_key(text: PretrainedConfig) -> str:
    return "decoder_layers" if _own(text, "decoder_layers") else "num_hidden_layers"


def _of_layers(value: object, number: int) -> bool:
    """Whether `value` is a list with one item for each of `number` layers."""
    return isinstance(value, list) and len(value) == number


def made_narrow(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model as a run builds it, with noise added to its parameters: a gate that starts at zero would hide what it
    lets through.
    """
    model = init_weights.outline(config, dtype, attention)
    unset = init_weights.make(model, list(init_weights.modules(model)), model, torch.device("cpu"), seed=0)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in unset & set(tensors):
        tensors[name].zero_()  # a run reads these from a checkpoint
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=MOVED)
    return model.eval()
