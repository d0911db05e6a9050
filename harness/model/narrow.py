"""A small model of a run's own config: the same architecture and settings, but narrow, to show before a run what holds.

What an architecture does with a cache, a mask or a cut cannot be read off its config; on a model of this size it is
seen on the CPU, in well under a second.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TypeVar

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

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
"""Widths of the small model, the narrowest first: some architectures need more."""

FEWEST = 4
"""Layers that are left, or more, until each kind of layer is among them."""

LARGEST = 300_000_000
"""Parameters of the largest model that is tried."""

MOVED = 0.1
"""How far parameters are moved: enough to be seen in bf16."""


class NoneRuns(Exception):
    """No small model of a config runs; says why the last did not."""


def narrowest(
    shape: str,
    dtype: torch.dtype,
    attention: str,
    show: Callable[[PreTrainedModel], T],
    cut: bool = False,
    **more: float,
) -> tuple[PreTrainedModel, T]:
    """The narrowest model of `shape` (its config as JSON) that `show` takes, and what that gives.

    With `cut` it has no more layers than show each kind. `more` is what else is set in its config, where it has it.
    Raises NoneRuns.
    """
    given = json.loads(shape)
    kind, failed = given.pop("model_type"), "each is too large"
    for fewer, widths in product((True, False) if cut else (False,), NARROW):
        try:
            config = small(AutoConfig.for_model(kind, **copy.deepcopy(given)), {**widths, **more}, fewer)
            if count(init_weights.outline(config, dtype)) > LARGEST:
                continue
            model = made_narrow(config, dtype, attention)
            return model, show(model)
        except Exception as error:  # an architecture that cannot be so narrow fails in a way of its own
            failed = first_line(error)
    raise NoneRuns(failed)


def small(config: PretrainedConfig, widths: Mapping[str, float], cut: bool = False) -> PretrainedConfig:
    """`config` with narrow layers; as many, or with `cut` the first of them until each kind is there."""
    made = copy.deepcopy(config)
    text = made.get_text_config(decoder=True)
    if not any(text is each for each in vars(made).values()):
        text = made  # of an encoder and a decoder in one config transformers gives a copy
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
    return made


def _own(config: PretrainedConfig, key: str) -> float | None:
    """A number that `config` has under this name, or under what it calls that; None where it has none of its own."""
    value = vars(config).get(config.attribute_map.get(key, key))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cut(text: PretrainedConfig) -> None:
    """Leave the first layers of `text`, with each kind among them."""
    layers = "decoder_layers" if _own(text, "decoder_layers") else "num_hidden_layers"
    number = int(getattr(text, layers))
    lists = {key: value for key, value in vars(text).items() if _of_layers(value, number)}
    told = [
        *lists.values(),
        *filter(lambda each: _of_layers(each, number), [getattr(text, "layer_types", None)]),
    ]
    kinds = list(map(str, zip(*told, strict=True))) or [""]
    fewest = max(FEWEST, *(kinds.index(kind) + 1 for kind in kinds))
    if fewest < number:
        setattr(text, layers, fewest)
        for key, value in lists.items():
            setattr(text, key, value[:fewest])


def _of_layers(value: object, number: int) -> bool:
    """Whether it says something of each of so many layers."""
    return isinstance(value, list) and len(value) == number


def made_narrow(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The whole as a run makes it, its parameters moved: a gate that is shut at first hides what it lets through."""
    whole = init_weights.outline(config, dtype, attention)
    unset = init_weights.make(whole, list(init_weights.modules(whole)), whole, torch.device("cpu"), seed=0)
    tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    for name in unset & set(tensors):
        tensors[name].zero_()  # a run has a checkpoint's
    for parameter in whole.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=MOVED)
    return whole.eval()


def first_line(error: Exception) -> str:
    """What `error` says first, for a sentence about it."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].partition(". ")[0][:160]
