"""Tensor parallelism in generation: ranks that share each layer, by transformers' own plan for a model.

A plan says which parameters are cut, and along which side; each rank keeps its part, with its heads' keys and values,
and adds up or puts together what the others made of theirs. All of a group see the same tokens and choose the same.

The whole model is made, or read, in the host's memory, and cut there parameter by parameter: so what a seed draws is
what one rank alone would have.
"""

import torch
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from harness import model, weights
from harness.knobs import Refusal, Settings
from harness.world import World

KEY = "generation.tensor_parallel"


def check(settings: Settings, config: PretrainedConfig) -> None:
    """Refuse a model that cannot be shared by so many ranks, before it is made. Raises Refusal."""
    ranks = settings.tensor_parallel
    if ranks == 1:
        return
    if not _plan(weights.outline(config, torch.bfloat16), ranks):
        remedy = f"transformers has no plan to share {config.model_type}; use 1, and more replicas"
        raise Refusal(KEY, ranks, remedy)
    text = config.get_text_config(decoder=True)
    heads = {name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    for name, number in heads.items():
        if isinstance(number, int) and number % ranks:
            most = max(few for few in range(1, ranks) if all(n % few == 0 for n in heads.values() if n))
            raise Refusal(KEY, ranks, f"must divide {name}={number} evenly; use {most}")


def build(
    settings: Settings, config: PretrainedConfig, dtype: torch.dtype, world: World
) -> tuple[PreTrainedModel, dict[str, int]]:
    """This rank's part of the model on its device, and the sizes of the whole. Raises Refusal as `model.build`.

    Every part has storages of its own. The ranks of a group follow each other.
    """
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    host = torch.device("cpu")
    built = model.build(settings.model, config, dtype, host, settings.seed, world.rehearsed)
    sizes = model.sizes(built)
    built.eval().requires_grad_(False)
    for name, style in _plan(built, world.tensor).items():  # one by one: what was whole is let go of at once
        apply_tensor_parallelism(built, world.mesh, {name: style})
    for held in (*built.parameters(), *built.buffers()):
        if not isinstance(held, DTensor):
            held.data = held.data.to(world.device)
        elif (part := held.to_local()).untyped_storage().nbytes() > part.nbytes:  # a view of the whole
            held._local_tensor = part.clone()
    return built, sizes


def uneven(config: PretrainedConfig, ranks: int) -> bool:
    """Whether the parts of some parameter that so many ranks share are not all of one size."""
    whole = weights.outline(config, torch.bfloat16)
    cut = _plan(whole, ranks)
    return any(
        size % ranks for name, held in whole.named_parameters() if name in cut for size in held.shape[-2:]
    )


def _plan(whole: PreTrainedModel, ranks: int) -> dict[str, str]:
    """Which module or parameter is shared in which style; empty where transformers knows of none, or is too old."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        found: dict[str, str] = whole._resolve_parallel_plans(DistributedConfig(tp_size=ranks))[0]
    except (ImportError, AttributeError, TypeError):
        remedy = "this transformers shares models in another way; use 5.23 or later, or 1"
        raise Refusal(KEY, ranks, remedy) from None
    except ValueError:
        return {}
    return found
