"""Tensor parallelism in generation: neighbouring ranks share every layer, by transformers' own plan for the model.

A rank has its part of each weight as a DTensor, and the keys and values of its heads. The plan's modules compute with
that part, then add up or gather the ranks' results. All ranks of a group see the same tokens and choose the same. The
plan is applied to a model on `meta`, as transformers applies it before it loads weights: no whole weight is ever on the
device, whether it is read or randomly initialised.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from harness.config.settings import Refusal
from harness.ledger.patch import TRANSFORMERS, Patch, patched, table
from harness.model import init_weights

KEY = "generation.tensor_parallel"

_MODEL = "transformers.modeling_utils.PreTrainedModel"
_ONE_GROUP = "transformers shares a model among all ranks, and here there may be several groups"

PATCHES = table(
    Patch(_MODEL, "prepare_distribute_model", _ONE_GROUP, TRANSFORMERS),
    Patch(_MODEL, "maybe_distribute_model", _ONE_GROUP, TRANSFORMERS),
)


def outline(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, mesh: DeviceMesh | None
) -> PreTrainedModel:
    """The whole model on `meta`, its layers shared by the ranks of `mesh` if there is one. Raises Refusal."""
    whole = init_weights.outline(config, dtype, attention)
    return whole if mesh is None else shared(whole, mesh)


def shared(whole: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Split the parameters and modules of `whole`, on `meta`, over the ranks of `mesh`.

    Raises Refusal where transformers has no plan for the model, or its heads cannot be divided evenly.
    """
    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError:
        raise _too_old(mesh.size()) from None
    plan = _plan(whole, mesh.size())
    _check(whole, plan, mesh.size())
    # the plan has an entry for each of two tied names, but there is only one parameter: untie them first
    for tied_name, first_name in whole.all_tied_weights_keys.items():
        parent, _, key = tied_name.rpartition(".")
        if first_name not in plan:  # a parameter that is whole under one name must be whole under both
            plan.pop(tied_name, None)
            plan.pop(parent, None)
        parameter = whole.get_parameter(tied_name)
        setattr(
            whole.get_submodule(parent),
            key,
            nn.Parameter(torch.empty_like(parameter), parameter.requires_grad),
        )
    apply_tensor_parallelism(whole, mesh, plan)
    whole.tie_weights(recompute_mapping=False)
    whole._tp_size, whole._device_mesh = mesh.size(), mesh
    return whole


def load(directory: Path, whole: PreTrainedModel, mesh: DeviceMesh, **options: Any) -> tuple[Any, Any]:
    """transformers' `from_pretrained` of `directory`, where this rank reads only its part; and the loading report.

    `whole` is the model on `meta`. transformers would use one group of all ranks; here there may be several groups.
    """
    kind = type(whole)

    def prepare_distribute_model(distributed_config: Any, device_map: Any = None) -> Any:
        return distributed_config, device_map, None

    def maybe_distribute_model(model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        return shared(model, mesh)

    with patched(
        PATCHES[f"{_MODEL}.prepare_distribute_model"].by(
            lambda _: staticmethod(prepare_distribute_model), kind
        ),
        PATCHES[f"{_MODEL}.maybe_distribute_model"].by(lambda _: staticmethod(maybe_distribute_model), kind),
    ):
        loaded, report = kind.from_pretrained(
            directory, distributed_config=_distributed_config(mesh.size()), **options
        )
    return loaded, report


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers on this rank; each counts once, whatever its number of names."""
    tensors = (*module.parameters(), *module.buffers())
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def _check(whole: PreTrainedModel, plan: Mapping[str, str], ranks: int) -> None:
    if not any(part.isdigit() for name in plan for part in name.split(".")):  # no entry for a layer
        remedy = f"transformers has no tensor-parallel plan for {whole.config.model_type}; use 1, or pipeline.stages="
        raise Refusal(KEY, ranks, remedy)
    text = whole.config.get_text_config(decoder=True)
    heads = {name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    numbers = [number for number in heads.values() if isinstance(number, int)]
    for name, number in heads.items():
        if isinstance(number, int) and number % ranks:
            largest = max(
                divisor for divisor in range(1, ranks) if not any(value % divisor for value in numbers)
            )
            raise Refusal(KEY, ranks, f"must divide {name}={number} evenly; use {largest}")


def _plan(whole: PreTrainedModel, ranks: int) -> dict[str, str]:
    """From module or parameter names to the style in which each is shared; empty where transformers has no plan."""
    distributed_config = _distributed_config(ranks)
    try:
        plan: dict[str, str] = whole._resolve_parallel_plans(distributed_config)[0]
    except AttributeError:
        raise _too_old(ranks) from None
    except ValueError:
        return {}
    return plan


def _distributed_config(ranks: int) -> Any:
    """transformers' config for so many ranks (tp_size)."""
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_size=ranks)
    except (ImportError, TypeError):
        raise _too_old(ranks) from None


def _too_old(ranks: int) -> Refusal:
    return Refusal(KEY, ranks, "this transformers shares models in another way; use 5.23 or later, or 1")
