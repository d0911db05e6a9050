"""Tensor parallelism in generation: neighbouring ranks share every layer, by transformers' own plan for the model.

A rank has its part of each weight as a DTensor, and its heads' keys and values; the plan's modules compute with that
part, and add up or gather what the ranks made. All of a group see the same tokens and choose the same. The plan is
applied to an outline on `meta`, as transformers applies it before it loads: so nothing whole is on the device, whether
weights are read or drawn.
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
from harness.model import init_weights

KEY = "generation.tensor_parallel"


def outline(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, mesh: DeviceMesh | None
) -> PreTrainedModel:
    """The whole model on `meta`, its layers shared by the ranks of `mesh` where there is one. Raises Refusal."""
    whole = init_weights.outline(config, dtype, attention)
    return whole if mesh is None else shared(whole, mesh)


def shared(whole: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """`whole`, on `meta`, with parameters and modules that the ranks of `mesh` share.

    Raises Refusal where transformers has no plan for it, or its heads cannot be shared evenly.
    """
    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError:
        raise _too_old(mesh.size()) from None
    plan = _plan(whole, mesh.size())
    _check(whole, plan, mesh.size())
    # the plan has a line for each of two that are tied, and finds one parameter for both
    for other, first in whole.all_tied_weights_keys.items():
        home, _, key = other.rpartition(".")
        if first not in plan:  # what is whole in one place is whole in both
            plan.pop(other, None)
            plan.pop(home, None)
        tied = whole.get_parameter(other)
        setattr(whole.get_submodule(home), key, nn.Parameter(torch.empty_like(tied), tied.requires_grad))
    apply_tensor_parallelism(whole, mesh, plan)
    whole.tie_weights(recompute_mapping=False)
    whole._tp_size, whole._device_mesh = mesh.size(), mesh
    return whole


def load(directory: Path, whole: PreTrainedModel, mesh: DeviceMesh, **options: Any) -> tuple[Any, Any]:
    """transformers' `from_pretrained` of `directory`, of which this rank reads its part; and its report.

    `whole` is an outline. transformers' own groups of ranks are the whole world's; here there may be several.
    """
    kind = type(whole)

    class Shared(kind):  # type: ignore[valid-type, misc]
        @classmethod
        def prepare_distribute_model(cls, distributed_config: Any, device_map: Any = None) -> Any:
            return distributed_config, device_map, None

        @classmethod
        def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
            return shared(model, mesh)

    Shared.__name__, Shared.__module__ = (
        kind.__name__,
        kind.__module__,
    )  # how it is read is looked up by these
    loaded, report = Shared.from_pretrained(directory, distributed_config=_asked(mesh.size()), **options)
    loaded.__class__ = kind
    return loaded, report


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers that this rank has, each once however many names it has."""
    held = (*module.parameters(), *module.buffers())
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in held)


def _check(whole: PreTrainedModel, plan: Mapping[str, str], ranks: int) -> None:
    if not any(part.isdigit() for name in plan for part in name.split(".")):  # no layer
        remedy = f"transformers has no plan to share {whole.config.model_type}; use 1, or pipeline.stages="
        raise Refusal(KEY, ranks, remedy)
    text = whole.config.get_text_config(decoder=True)
    heads = {name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    numbers = [number for number in heads.values() if isinstance(number, int)]
    for name, number in heads.items():
        if isinstance(number, int) and number % ranks:
            most = max(few for few in range(1, ranks) if not any(each % few for each in numbers))
            raise Refusal(KEY, ranks, f"must divide {name}={number} evenly; use {most}")


def _plan(whole: PreTrainedModel, ranks: int) -> dict[str, str]:
    """Which module or parameter is shared in which style; empty where transformers knows of none."""
    asked = _asked(ranks)
    try:
        found: dict[str, str] = whole._resolve_parallel_plans(asked)[0]
    except AttributeError:
        raise _too_old(ranks) from None
    except ValueError:
        return {}
    return found


def _asked(ranks: int) -> Any:
    """transformers' own word for it."""
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_size=ranks)
    except (ImportError, TypeError):
        raise _too_old(ranks) from None


def _too_old(ranks: int) -> Refusal:
    return Refusal(KEY, ranks, "this transformers shares models in another way; use 5.23 or later, or 1")
