"""Tensor parallelism: neighbouring ranks share every layer, by transformers' own plan for the model.

A rank has its part of each weight as a DTensor, and its KV heads; the plan's modules compute with that part and add up
or gather what the ranks made. The plan is applied to an outline on `meta`, as transformers applies it before it loads:
so nothing whole is on the device, whether weights are read or drawn.
"""

from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism, get_kv_heads_per_rank

from harness import weights
from harness.knobs import Refusal
from harness.world import unlike_others

KEY = "generation.tensor_parallel"


def outline(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, mesh: DeviceMesh | None
) -> PreTrainedModel:
    """The whole model on `meta`, its layers shared by the ranks of `mesh` where there is one. Raises Refusal."""
    whole = weights.outline(config, dtype, attention)
    return whole if mesh is None else shared(whole, mesh)


def shared(whole: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """`whole`, on `meta`, with parameters and modules that the ranks of `mesh` share. Raises Refusal as `check` does."""
    check(whole, mesh.size())
    for (
        other
    ) in whole.all_tied_weights_keys:  # the plan has a line for each, and finds one parameter for both
        home, _, key = other.rpartition(".")
        tied = whole.get_parameter(other)
        setattr(whole.get_submodule(home), key, nn.Parameter(torch.empty_like(tied), tied.requires_grad))
    plan, *_ = whole._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
    apply_tensor_parallelism(whole, mesh, plan)
    whole.tie_weights(recompute_mapping=False)
    whole._tp_size, whole._device_mesh = mesh.size(), mesh
    return whole


def check(whole: PreTrainedModel, ranks: int) -> None:
    """Refuse a model that transformers has no plan for, or whose heads so many ranks cannot share evenly."""
    if not whole.tp_plan:
        remedy = f"transformers has no plan for {whole.config.model_type}; use {KEY}=1, or pipeline.stages="
        raise Refusal(KEY, ranks, remedy)
    text = whole.config.get_text_config(decoder=True)
    heads: int = text.num_attention_heads
    groups: int = getattr(text, "num_key_value_heads", None) or heads
    of_a_rank = get_kv_heads_per_rank(whole.tp_plan, groups, ranks)
    if of_a_rank is None or (of_a_rank != groups and heads % ranks):
        most = gcd(heads, groups)
        remedy = f"ranks share heads evenly, and the model has {heads}, with {groups} for keys and values"
        raise Refusal(KEY, ranks, f"{remedy}; use a divisor of {most}")


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

    Shared.__name__ = kind.__name__  # some of transformers goes by it
    loaded, report = Shared.from_pretrained(
        directory, distributed_config=DistributedConfig(tp_size=mesh.size()), **options
    )
    loaded.__class__ = kind
    return loaded, report


def held(module: nn.Module) -> int:
    """Elements of a module's parameters that this rank has, each once however many names it has."""
    return sum(part(parameter).numel() for parameter in module.parameters())


def sizes(config: PretrainedConfig, ranks: int, rank: int) -> tuple[int, ...]:
    """The elements of each parameter of a model that rank `rank` of the `ranks` that share it has. Raises Refusal."""
    nobody = {"_init_backend": False, "_rank": rank}
    mesh = DeviceMesh("cpu", list(range(ranks)), mesh_dim_names=(unlike_others(),), **nobody)
    whole = shared(weights.outline(config, torch.bfloat16), mesh)
    return tuple(part(parameter).numel() for parameter in whole.parameters())


def part(tensor: Tensor) -> Tensor:
    """What of `tensor` this rank has: all, or its part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
