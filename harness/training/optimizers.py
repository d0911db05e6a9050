"""The optimizer that DeepSpeed steps, by `optimizer.kind`: a torch optimizer, and its state as tensors of a checkpoint.

AdamW, SGD and Adafactor are torch's. Muon is DeepSpeed's, with torch's AdamW beside it: torch's Muon refuses the flat
parts of weights that ZeRO updates, while DeepSpeed's is one optimizer at every stage. Lion and the AdamW of 8 bits are
those of bitsandbytes: it has kernels for GPUs and plain code for CPUs, while torchao compiles a step for each shape of
a parameter, and DeepSpeed's Lion compiles C++ where it is made.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harness.config.rules.optimizer import BY_LIBRARY, MOMENTUM
from harness.config.settings import Settings
from harness.runtime.imports import import_bitsandbytes
from harness.runtime.world import World


def import_library(settings: Settings) -> None:
    """Import what the optimizer needs, before a ledger counts: tensors of its modules are no part of a run."""
    if settings.optimizer.kind in BY_LIBRARY:
        import_bitsandbytes()


def build(settings: Settings, world: World, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `settings` for the parameters of `model` that are trained."""
    kind, train = settings.optimizer.kind, settings.train
    # without ZeRO, DeepSpeed takes a step without gradients at first: only decay could change a weight in it
    rate = train.learning_rate if kind == "adamw" else 0.0
    common: dict[str, Any] = {"lr": rate, "weight_decay": train.weight_decay}
    # torch's own choice; set here because a rehearsal for a GPU does not run on one
    foreach = world.kind == "cuda" and settings.zero.offload == "none" and not train.fused
    moments: dict[str, Any] = {"betas": train.betas, "eps": train.epsilon}
    kernels: dict[str, Any] = {"foreach": foreach, "fused": train.fused}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "adafactor":
        return torch.optim.Adafactor(parameters, **common, foreach=foreach)
    if kind == "sgd":
        return torch.optim.SGD(parameters, **common, **kernels, momentum=momentum(settings))
    if kind == "muon":
        return _muon(settings, model, common, moments, foreach)
    if kind == "lion":
        lion: torch.optim.Optimizer = import_bitsandbytes().optim.Lion(
            parameters, **common, betas=train.betas
        )
        return lion
    if kind == "adamw_8bit":
        in_8_bits: torch.optim.Optimizer = import_bitsandbytes().optim.AdamW8bit(
            parameters, **common, **moments
        )
        return in_8_bits
    return torch.optim.AdamW(parameters, **common, **moments, **kernels)


def momentum(settings: Settings) -> float:
    """`optimizer.momentum`, or its default for this kind."""
    given = settings.optimizer.momentum
    return MOMENTUM[settings.optimizer.kind] if given is None else given


def _muon(
    settings: Settings,
    model: nn.Module,
    common: Mapping[str, Any],
    moments: Mapping[str, Any],
    foreach: bool,
) -> torch.optim.Optimizer:
    """DeepSpeed's Muon for the matrices between embedding and head, and torch's AdamW for all else.

    `standard` is the iteration of torch's Muon, in bf16; DeepSpeed's default takes fp16 where a device has it.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    updated = {id(parameter) for parameter in matrices(model)}
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.use_muon = id(parameter) in updated  # type: ignore[attr-defined]
        groups[parameter.use_muon].append(parameter)  # type: ignore[attr-defined]
    own = {"momentum": momentum(settings), "ns_method": "standard"}
    listed = [
        {"params": groups[use], "use_muon": use, **common, **(own if use else moments)}
        for use in (True, False)
        if groups[use]
    ]
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(
        listed, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"foreach": foreach}
    )
    return optimizer


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters that Muon updates, in the model's order: a matrix, or one for each expert."""
    outside = {id(parameter) for parameter in _embeddings(model)}
    trained = (each for each in model.parameters() if each.requires_grad and id(each) not in outside)
    return [
        each for each in trained if _is_matrix(getattr(each, "ds_shape", each.shape))
    ]  # ZeRO-3 empties it


def _is_matrix(shape: torch.Size) -> bool:
    return len(shape) >= 2 and min(shape[-2:]) > 1


def _embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of tables of vectors, and of the head."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters(recurse=False)
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            yield from head.parameters(recurse=False)


def state_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a parameter by name. A number is a tensor of int64 without dimensions."""
    state = optimizer.state.get(parameter, {})
    return {
        key: torch.tensor(value) if isinstance(value, int) else value
        for key, value in state.items()
        if value is not None and key not in _TABLES
    }


def load_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, saved: Mapping[str, torch.Tensor]
) -> None:
    """Give `parameter` the state that `state_of` returned in the run that saved it."""
    state: dict[str, Any] = {}
    for key, value in saved.items():
        if value.dim():
            state[key] = value.to(parameter.device)
        else:
            state[key] = int(value) if value.dtype == torch.int64 else value
    for key, name in _TABLES.items():
        if key.replace("qmap", "absmax") in state:
            tables: dict[str, torch.Tensor] = optimizer.name2qmap  # type: ignore[attr-defined]
            tables[name] = tables[name].to(parameter.device)
            state[key] = tables[name]
    optimizer.state[parameter] = state


_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""What 8-bit codes stand for, one for all parameters: bitsandbytes makes it, and it is no part of a checkpoint."""
