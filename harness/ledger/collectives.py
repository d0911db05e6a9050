"""Make the frees after collectives happen in the same order in every run."""

from types import FunctionType
from typing import Any

import torch
from torch.distributed.nn import functional

from harness.ledger.patch import install
from harness.ledger.patch_table import PATCHES


def settle(arguments: Any) -> None:
    """Wait until the process group among a collective's `arguments` has released its references to their tensors.

    gloo's thread drops its references after the caller wakes, at a time that differs between runs. A collective
    without elements is queued behind it in that thread. Point-to-point operators have no such partner call.
    """
    for argument in arguments:
        group = group_of(argument)
        if group is not None:
            group.allreduce([torch.empty(0)]).wait()


def group_of(argument: Any) -> Any:
    """The process group that `argument` is or names. None if it is something else."""
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return torch.distributed.ProcessGroup.unbox(argument)
    if isinstance(argument, str):
        try:
            group_name: Any = argument
            return torch._C._distributed_c10d._resolve_process_group(group_name)
        except RuntimeError:  # the string names a reduction
            return None
    return argument if isinstance(argument, torch.distributed.ProcessGroup) else None


def release_default_group() -> None:
    """Remove process groups from the default arguments of torch.distributed.nn.functional, which Dynamo imports.

    These defaults are set at import to the group that is the default then. If the import comes after
    init_process_group, gloo's threads outlive destroy_process_group, and a thread that frees a tensor while Python
    exits aborts the process (torch 2.13). With None, as with an earlier import, the functions use the group that
    is the default when they are called.
    """
    for function in vars(functional).values():
        if isinstance(function, FunctionType) and function.__defaults__:
            install(_DEFAULTS.by(_without_groups, function))


_DEFAULTS = PATCHES["torch.distributed.nn.functional.all_reduce.__defaults__"]


def _without_groups(defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        None if isinstance(default, torch.distributed.ProcessGroup) else default for default in defaults
    )
