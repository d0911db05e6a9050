"""Fill a model on `meta` with weights: random ones determined by a seed and parameter names, or those of a checkpoint.

A model on `meta` takes no memory. Only the requested part is allocated, module by module, each module with its own
seed. So a part has the same weights as the whole model, whichever rank has it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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

PACKED = (torch.uint8, torch.int8)
"""The dtypes of packed weights, which are read and never drawn."""

Stored = Mapping[str, Tensor]
"""Parameters, and the buffers that a checkpoint has, by the first name that each has in the whole model."""

Home = dict[str, Any]
"""A module's own dict of parameters or of buffers."""


def outline(config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The whole model of `config` on `meta`: shapes without memory. Raises Refusal where it cannot be built."""
    with torch.device("meta"), shape.building(config):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
        shape.check_whole(model, config)
    return model


def modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of `model` with its name, children before parents: the order in which weights are initialised."""
    for name, child in model.named_children():
        yield from modules(child, f"{prefix}{name}.")
    yield prefix.removesuffix("."), model


def lasting(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers by name: those that a checkpoint has."""
    return {
        f"{name}.{key}".removeprefix("."): buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


def make(
    model: PreTrainedModel,
    tree: list[tuple[str, nn.Module]],
    part: nn.Module,
    device: torch.device,
    seed: int,
    settled: Callable[[str, nn.Module], object] = lambda name, module: None,
) -> set[str]:
    """Allocate the parameters and buffers of `part`, a part of `model`, on `device` and give them random values.

    `tree` is `modules(model)` of the whole model. A parameter with two names is initialised under the first. Of a
    DTensor the whole tensor is initialised first, and then only this rank's part is kept. `settled` is called with each
    layer and its name, once its weights are final, and may put others in their place. Returns the names of tensors that
    transformers does not initialise: they have uninitialised memory.
    """
    wanted = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
    by_name = dict(tree)
    replaced: dict[int, Tensor] = {}
    meta_tensors = []  # kept alive, so that no new tensor reuses an id()
    allocated: dict[str, tuple[Home, Tensor]] = {}
    # from id() of a whole tensor to the DTensor that says how ranks share it
    whole_dtensors: dict[int, DTensor] = {}
    for name, module in tree:
        own: tuple[Home, ...] = (module._parameters, module._buffers)
        for home, key in [(item, key) for item in own for key in item]:
            meta_tensor = home[key]
            if meta_tensor is None or id(meta_tensor) not in wanted:
                continue
            if id(meta_tensor) in replaced:
                _mark_initialised(replaced[id(meta_tensor)])
            else:
                meta_tensors.append(meta_tensor)
                replaced[id(meta_tensor)] = _empty(meta_tensor)
                if isinstance(meta_tensor, DTensor):
                    whole_dtensors[id(replaced[id(meta_tensor)])] = meta_tensor
            home[key] = replaced[id(meta_tensor)]
            allocated[f"{name}.{key}"] = home, replaced[id(meta_tensor)]
        if isinstance(module, PreTrainedModel):
            _settle(module, device, whole_dtensors)
        _initialise(_within(by_name, name), name, module, seed)
        if isinstance(by_name.get(name.rpartition(".")[0]), nn.ModuleList):
            _settle(module, device, whole_dtensors)  # a layer is complete: the host has one at a time
            settled(name, module)
    set_seed(seed)  # later random numbers do not depend on the part
    unset = {name for name, (_, tensor) in allocated.items() if not tensor._version}  # never written to
    unset = {name for name in unset if allocated[name][0][name.rpartition(".")[2]] is allocated[name][1]}
    dtensors = {id(replaced[id(item)]): item for item in meta_tensors if isinstance(item, DTensor)}
    parts = {key: _with_part(replaced[id(meta_tensor)], meta_tensor) for key, meta_tensor in dtensors.items()}
    for name, (home, tensor) in allocated.items():
        if id(tensor) in parts:
            home[name.rpartition(".")[2]] = parts[id(tensor)]
    return unset


def part_of(whole: Tensor, outlined: DTensor, device: torch.device) -> Tensor:
    """This rank's part of `whole`, which ranks share as the DTensor `outlined` says; on `device`, in a storage of its
    own.

    transformers' own function cuts it, as it cuts what it reads, before the copy to the device.
    """
    from transformers.distributed.sharding_utils import DtensorShardOperation

    part: Tensor | None = DtensorShardOperation(outlined).shard_tensor(whole, device=device)
    assert part is not None
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


def _with_part(part: Tensor, dtensor: DTensor) -> nn.Parameter:
    """A parameter like `dtensor`, with this rank's `part` as its local tensor."""
    mesh, placements, shape = dtensor.device_mesh, dtensor.placements, dtensor.shape
    filled = DTensor.from_local(
        part.data, mesh, placements, run_check=False, shape=shape, stride=dtensor.stride()
    )
    return nn.Parameter(filled, dtensor.requires_grad)


def _empty(meta_tensor: Tensor) -> Tensor:
    tensor = torch.empty_strided(
        meta_tensor.shape, meta_tensor.stride(), dtype=meta_tensor.dtype, device="cpu"
    )
    return (
        nn.Parameter(tensor, meta_tensor.requires_grad) if isinstance(meta_tensor, nn.Parameter) else tensor
    )


@torch.no_grad()
def _initialise(within: PreTrainedModel, name: str, module: nn.Module, seed: int) -> None:
    """Initialise as transformers does, but with a seed for each module, and on the CPU: every device gets the same
    values.
    """
    if any(not tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        torch.default_generator.manual_seed(int.from_bytes(digest))
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dtype in PACKED:  # GPT-BigCode would draw it from a module around its layer
                _mark_initialised(tensor)
        within._init_weights(module)


def _within(by_name: Mapping[str, nn.Module], name: str) -> PreTrainedModel:
    """The nearest PreTrainedModel around the module of this name: it has the `_init_weights` for the module."""
    while not isinstance(module := by_name[name], PreTrainedModel):
        name = name.rpartition(".")[0]
    return module


def _settle(module: nn.Module, device: torch.device, whole_dtensors: dict[int, DTensor]) -> None:
    """Move the tensors of `module` to `device` and mark them, so that no outer module initialises them again.

    A rank with more modules would otherwise draw other values. Only this rank's part of the `whole_dtensors` is moved.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            dtensor = whole_dtensors.pop(id(tensor), None)
            tensor.data = tensor.data.to(device) if dtensor is None else part_of(tensor.data, dtensor, device)
    for parameter in module.parameters():
        _mark_initialised(parameter)


def _mark_initialised(tensor: Tensor) -> None:
    """Mark `tensor` so that transformers does not initialise it."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def matches_checkpoint(model: PreTrainedModel, directory: Path) -> bool:
    """Whether the tensors in `directory` are exactly the weights of the whole `model`.

    Tied tensors must be equal; extra tensors that transformers ignores are allowed.
    """
    stored = _stored(directory)
    for pair in model.all_tied_weights_keys.items():
        if all(name in stored for name in pair) and not _equal(stored, pair):
            return False
    unexpected = set(stored) - set(model.state_dict())
    report = SimpleNamespace(missing_keys=set(), unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(report)
    return not report.unexpected_keys


def in_full(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of `names` that transformers keeps in fp32, whatever the dtype of the model."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return []
    pattern, *_ = build_glob_alternation(list(plan))
    return [name for name in names if pattern.search(name)]


def read(owned: Stored, directory: Path) -> bool:
    """Fill `owned` from the safetensors files in `directory`, one tensor at a time.

    Returns False and changes nothing unless all of them are there, with the same names and shapes.
    """
    stored = _stored(directory)
    if any(stored.get(name, (None, None))[1] != tuple(tensor.shape) for name, tensor in owned.items()):
        return False
    for path in sorted({stored[name][0] for name in owned}):
        with safe_open(path, framework="pt") as file:
            for name, tensor in owned.items():
                if stored[name][0] == path:
                    _copy(tensor, file.get_tensor(name))
    return True


@torch.no_grad()
def _copy(tensor: Tensor, whole: Tensor) -> None:
    """Fill `tensor` from `whole`, or from this rank's part of it."""
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(part_of(whole, tensor, tensor.device))
    else:
        tensor.data.copy_(whole)


def _equal(stored: Mapping[str, tuple[Path, tuple[int, ...]]], names: tuple[str, str]) -> bool:
    """Whether two tensors of a checkpoint are equal."""
    tensors = []
    for name in names:
        with safe_open(stored[name][0], framework="pt") as file:
            tensors.append(file.get_tensor(name))
    return torch.equal(*tensors)


def _stored(directory: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The file and the shape of each tensor in `directory`."""
    files = [directory / SAFE_WEIGHTS_NAME]
    if (directory / SAFE_WEIGHTS_INDEX_NAME).is_file() and not files[0].is_file():
        files = sorted(directory.glob("model-*.safetensors"))
    tensors: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in files:
        # framework="pt" maps the file, which would count as allocated memory
        with safe_open(path, framework="numpy") as file:
            tensors |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    return tensors
