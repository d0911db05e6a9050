"""Parameters for a model that was made without any: random ones that a seed and their names decide, or a checkpoint's.

A model on `meta` takes no memory. Only what is asked for is made, module by module, each from a seed of its own:
so the weights of a part are those of the whole, whoever has the part.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from harness.model import shape

Stored = Mapping[str, Tensor]
"""Parameters, and buffers that a checkpoint has, by the first name that they have in the whole model."""

Home = dict[str, Any]
"""A module's own parameters, or its buffers."""


def outline(config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The whole model of `config` on `meta`: shapes, and no memory. Raises Refusal where it cannot be built."""
    with torch.device("meta"), shape.building(config):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
        shape.check_whole(made, config)
    return made


def modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of `model` with its name, those within it before it: the order in which weights are initialised."""
    for name, child in model.named_children():
        yield from modules(child, f"{prefix}{name}.")
    yield prefix.removesuffix("."), model


def lasting(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint has, by name."""
    return {
        f"{name}.{key}".removeprefix("."): buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


def make(
    model: PreTrainedModel,
    tree: list[tuple[str, nn.Module]],
    kept: nn.Module,
    device: torch.device,
    seed: int,
) -> set[str]:
    """Give the parameters and buffers of `kept`, a part of `model`, memory on `device` and random values.

    `tree` is `modules(model)`, of the whole. A parameter that has two names there is initialised as the first says.
    Of one that is a DTensor this rank's part is kept, once the whole was made.
    Returns the names of those that transformers gives no value: what is in them is what was in the memory.
    """
    held = {id(tensor) for tensor in (*kept.parameters(), *kept.buffers())}
    by_name = dict(tree)
    replaced: dict[int, Tensor] = {}
    outlines = []  # kept alive, so that no other tensor takes the place in memory that names one
    made: dict[str, tuple[Home, Tensor]] = {}
    uncut: dict[int, DTensor] = {}  # of a whole tensor the outline that says how ranks share it
    for name, module in tree:
        own: tuple[Home, ...] = (module._parameters, module._buffers)
        for home, key in [(each, key) for each in own for key in each]:
            outlined = home[key]
            if outlined is None or id(outlined) not in held:
                continue
            if id(outlined) in replaced:
                _drawn(replaced[id(outlined)])
            else:
                outlines.append(outlined)
                replaced[id(outlined)] = _empty(outlined)
                if isinstance(outlined, DTensor):
                    uncut[id(replaced[id(outlined)])] = outlined
            home[key] = replaced[id(outlined)]
            made[f"{name}.{key}"] = home, replaced[id(outlined)]
        if isinstance(module, PreTrainedModel):
            _settle(module, device, uncut)
        _initialise(_within(by_name, name), name, module, seed)
        if isinstance(by_name.get(name.rpartition(".")[0]), nn.ModuleList):
            _settle(module, device, uncut)  # a layer: the host has one at a time
    set_seed(seed)  # what follows is the same whatever part was made
    unset = {name for name, (_, tensor) in made.items() if not tensor._version}  # nothing wrote into it
    unset = {name for name in unset if made[name][0][name.rpartition(".")[2]] is made[name][1]}
    spread = {id(replaced[id(each)]): each for each in outlines if isinstance(each, DTensor)}
    parts = {key: _with_part(replaced[id(outlined)], outlined) for key, outlined in spread.items()}
    for name, (home, tensor) in made.items():
        if id(tensor) in parts:
            home[name.rpartition(".")[2]] = parts[id(tensor)]
    return unset


def part_of(whole: Tensor, outlined: DTensor, device: torch.device) -> Tensor:
    """This rank's part of `whole`, which ranks share as `outlined`; on `device`, with a storage of its own.

    It is cut as transformers cuts what it reads, before it goes to the device.
    """
    from transformers.distributed.sharding_utils import DtensorShardOperation

    part: Tensor | None = DtensorShardOperation(outlined).shard_tensor(whole, device=device)
    assert part is not None
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


def _with_part(part: Tensor, outlined: DTensor) -> nn.Parameter:
    """`outlined` with this rank's `part`."""
    mesh, placements, shape = outlined.device_mesh, outlined.placements, outlined.shape
    made = DTensor.from_local(
        part.data, mesh, placements, run_check=False, shape=shape, stride=outlined.stride()
    )
    return nn.Parameter(made, outlined.requires_grad)


def _empty(outlined: Tensor) -> Tensor:
    made = torch.empty_strided(outlined.shape, outlined.stride(), dtype=outlined.dtype, device="cpu")
    return nn.Parameter(made, outlined.requires_grad) if isinstance(outlined, nn.Parameter) else made


@torch.no_grad()
def _initialise(within: PreTrainedModel, name: str, module: nn.Module, seed: int) -> None:
    """As transformers does, but from a seed of its own; on the host, so that every device gets the same."""
    if any(not tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest))
        within._init_weights(module)


def _within(by_name: Mapping[str, nn.Module], name: str) -> PreTrainedModel:
    """The model, or model of a model, that initialises the module of this name."""
    while not isinstance(found := by_name[name], PreTrainedModel):
        name = name.rpartition(".")[0]
    return found


def _settle(module: nn.Module, device: torch.device, uncut: dict[int, DTensor]) -> None:
    """Move what `module` has to `device`, and let no model draw it again: one that has more would draw others.

    Of what is `uncut` only this rank's part.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            outlined = uncut.pop(id(tensor), None)
            tensor.data = (
                tensor.data.to(device) if outlined is None else part_of(tensor.data, outlined, device)
            )
    for parameter in module.parameters():
        _drawn(parameter)


def _drawn(tensor: Tensor) -> None:
    """Have transformers leave it as it is."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def familiar(model: PreTrainedModel, directory: Path) -> bool:
    """Whether the tensors in `directory` are the whole `model`'s, tied ones equal, or such as transformers ignores."""
    stored = _stored(directory)
    for pair in model.all_tied_weights_keys.items():
        if all(name in stored for name in pair) and not _equal(stored, pair):
            return False
    strange = set(stored) - set(model.state_dict())
    found = SimpleNamespace(missing_keys=set(), unexpected_keys=strange)
    model._adjust_missing_and_unexpected_keys(found)
    return not found.unexpected_keys


def in_full(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of `names` that transformers reads in fp32 whatever the rest is in."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return []
    pattern, *_ = build_glob_alternation(list(plan))
    return [name for name in names if pattern.search(name)]


def read(owned: Stored, directory: Path) -> bool:
    """Fill `owned` from the safetensors files in `directory`, one tensor at a time.

    False, and nothing is done, where not all of them are there under their own names and in their own shapes.
    """
    stored = _stored(directory)
    if any(stored.get(name, (None, None))[1] != tuple(tensor.shape) for name, tensor in owned.items()):
        return False
    for place in sorted({stored[name][0] for name in owned}):
        with safe_open(place, framework="pt") as file:
            for name, tensor in owned.items():
                if stored[name][0] == place:
                    _copy(tensor, file.get_tensor(name))
    return True


@torch.no_grad()
def _copy(tensor: Tensor, whole: Tensor) -> None:
    """Fill `tensor` from `whole`, or this rank's part of it."""
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(part_of(whole, tensor, tensor.device))
    else:
        tensor.data.copy_(whole)


def _equal(stored: Mapping[str, tuple[Path, tuple[int, ...]]], names: tuple[str, str]) -> bool:
    """Whether two tensors of a checkpoint are the same."""
    found = []
    for name in names:
        with safe_open(stored[name][0], framework="pt") as file:
            found.append(file.get_tensor(name))
    return torch.equal(*found)


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
