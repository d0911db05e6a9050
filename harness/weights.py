"""Parameters for a model that was made without any: random ones that a seed and their names decide, or a checkpoint's.

A model on `meta` takes no memory. Only what is asked for is made, module by module, each from a seed of its own:
so the weights of a part are those of the whole, whoever has the part.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate.utils import set_seed
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

Owned = Mapping[str, nn.Parameter]
"""Parameters by the first name that they have in the whole model."""


def outline(config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The whole model of `config` on `meta`: shapes, and no memory."""
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return made


def modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of `model` with its name, those within it before it: the order in which weights are initialised."""
    for name, child in model.named_children():
        yield from modules(child, f"{prefix}{name}.")
    yield prefix.removesuffix("."), model


def make(
    model: PreTrainedModel,
    tree: list[tuple[str, nn.Module]],
    kept: nn.Module,
    device: torch.device,
    seed: int,
) -> None:
    """Give the parameters and buffers of `kept`, a part of `model`, memory on `device` and random values.

    `tree` is `modules(model)`, of the whole. A parameter that has two names there is initialised as the first says.
    """
    parameters = {id(parameter) for parameter in kept.parameters()}
    buffers = {id(buffer) for buffer in kept.buffers()}
    replaced: dict[int, nn.Parameter] = {}
    outlines = []  # kept alive, so that no other parameter takes the place in memory that names one
    for name, module in tree:
        fresh = False
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in parameters:
                continue
            if id(parameter) not in replaced:
                outlines.append(parameter)
                fresh = True
                replaced[id(parameter)] = nn.Parameter(
                    torch.empty_like(parameter, device="cpu"), parameter.requires_grad
                )
            module._parameters[key] = replaced[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in buffers:
                fresh = True
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
        if fresh:
            _initialise(model, name, module, device, seed)
    set_seed(seed)  # what follows is the same whatever part was made


@torch.no_grad()
def _initialise(
    model: PreTrainedModel, name: str, module: nn.Module, device: torch.device, seed: int
) -> None:
    """As transformers does, but from a seed of its own; on the host, so that every device gets the same."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest))
    model._init_weights(module)
    for parameter in module._parameters.values():
        if parameter is not None and not parameter.is_meta:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            parameter.data = parameter.data.to(device)
    for key, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            module._buffers[key] = buffer.to(device)


def read(owned: Owned, directory: Path) -> bool:
    """Fill `owned` from the safetensors files in `directory`, one tensor at a time.

    False, and nothing is done, where not all of them are there under their own names and in their own shapes.
    """
    stored = _stored(directory)
    if any(stored.get(name, (None, None))[1] != tuple(parameter.shape) for name, parameter in owned.items()):
        return False
    for place in sorted({stored[name][0] for name in owned}):
        with safe_open(place, framework="pt") as file:
            for name, parameter in owned.items():
                if stored[name][0] == place:
                    parameter.data.copy_(file.get_tensor(name))
    return True


def _stored(directory: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Which file each tensor is in, and its shape."""
    files = [directory / SAFE_WEIGHTS_NAME]
    if (directory / SAFE_WEIGHTS_INDEX_NAME).is_file() and not files[0].is_file():
        files = sorted(directory.glob("model-*.safetensors"))
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in files:
        with safe_open(
            path, framework="numpy"
        ) as file:  # for torch it would map the file, as if it allocated it
            found |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    return found
