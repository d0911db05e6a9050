"""A transformers model: from a shape with random weights, or from a checkpoint; and back to one."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import set_seed
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from harness.knobs import Model, Refusal

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def model_config(settings: Model) -> PretrainedConfig:
    """The transformers config of `settings`: its own shape, or that of `model.path`. Raises Refusal."""
    if settings.path is not None:
        with _loading(settings.path):
            config = AutoConfig.from_pretrained(_local(settings.path), trust_remote_code=False)
    else:
        shape = dict(settings.config)
        kind = shape.pop("model_type", None)
        try:
            config = AutoConfig.for_model(kind, **shape)
        except Exception as error:  # a config's own checks raise what they like
            raise Refusal("model.config", settings.name, f"transformers refuses it: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        key, value = (
            ("model.path", settings.path) if settings.path else ("model.config.model_type", config.model_type)
        )
        raise Refusal(key, value, f"{config.model_type} is no causal language model in transformers")
    return config


def build(
    settings: Model, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """The model in `dtype` on `device`: weights of `model.path`, or random ones that `seed` alone decides.

    Every parameter has a storage of its own and of exactly its size. Raises Refusal where the memory is too small,
    or the checkpoint lacks a weight, has one too many, or one of another shape.
    """
    logging.disable_progress_bar()
    _check_memory(settings, config, dtype, device)
    if settings.path is None or settings.random:
        set_seed(seed)
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=settings.attention)
        return made.to(device)
    os.environ.setdefault(
        "HF_DEACTIVATE_ASYNC_LOAD", "1"
    )  # tensors made in other threads are in nobody's books
    with _loading(settings.path):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            _local(settings.path),
            config=config,
            dtype=dtype,
            attn_implementation=settings.attention,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            output_loading_info=True,
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, report[problem])):
            raise Refusal(
                "model.path",
                settings.path,
                f"its weights are not this model's: {len(found)} {problem.replace('_', ' ')}, {found[0]} first",
            )
    _own_storages(loaded)
    return loaded


def count(model: torch.nn.Module) -> int:
    """Parameters, each once however many names it has."""
    return sum(parameter.numel() for parameter in model.parameters())


def tokenizer(settings: Model, other: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `other` (`data.tokenizer`), else in `model.path`, else bytes. Raises Refusal."""
    for key, place in (("data.tokenizer", other), ("model.path", settings.path)):
        if place is not None and (key == "data.tokenizer" or _has_tokenizer(place)):
            with _loading(place, key):
                return AutoTokenizer.from_pretrained(_local(place), trust_remote_code=False)
    return ByT5Tokenizer()


def export(
    model: torch.nn.Module,
    state: Mapping[str, torch.Tensor] | None,
    tokens: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Write `model` with the weights in `state`, and its tokenizer, as transformers reads them; whole or not at all."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(partial, state_dict=dict(state) if state is not None else None)
    tokens.save_pretrained(partial)
    os.replace(partial, directory)


def size_in_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the model's parameters in `dtype`, counted without making them."""
    with torch.device("meta"):
        return count(AutoModelForCausalLM.from_config(config)) * dtype.itemsize


def _check_memory(
    settings: Model, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> None:
    needed = size_in_bytes(config, dtype)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        key, value = ("model.path", settings.path) if settings.path else ("model", settings.name)
        gib = 2**30
        raise Refusal(
            key,
            value,
            f"its parameters are {needed / gib:.1f} GiB in {str(dtype)[6:]}, and {free / gib:.1f} GiB of {device.type} "
            "memory are free; use a smaller model or a machine with more",
        )


def _own_storages(model: torch.nn.Module) -> None:
    """Take parameters out of mapped files and out of storages larger than they are."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _has_tokenizer(place: str) -> bool:
    local = Path(place).expanduser()
    return not local.is_dir() or any((local / name).is_file() for name in TOKENIZER_FILES)


def _local(place: str) -> str:
    return os.path.expanduser(place)


@contextmanager
def _loading(place: str, key: str = "model.path") -> Iterator[None]:
    """What the loading of `place` may raise, as a sentence."""
    try:
        yield
    except Refusal:
        raise
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError) as error:
        raise Refusal(
            key, place, f"no such directory, and the hub did not give it: {_first(error)}"
        ) from error
    except SafetensorError as error:
        raise Refusal(key, place, f"a safetensors file in it is torn: {_first(error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Refusal(key, place, f"it cannot be loaded: {_first(error)}") from error


def _first(error: Any) -> str:
    """The first line of what a library says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
