"""Collectives that repeat: frees after them happen in an order that no two runs would share."""

from types import FunctionType
from typing import Any

import torch
from torch.distributed.nn import functional


def settle(arguments: Any) -> None:
    """Wait until the process group among a collective's `arguments` has let go of what it was given.

    gloo's thread drops its references after the caller wakes, at a moment that no two runs share. A collective of
    no elements comes after it in the thread's queue. Point-to-point operators have no such pairing.
    """
    for argument in arguments:
        group = _group(argument)
        if group is not None:
            group.allreduce([torch.empty(0)]).wait()


def _group(argument: Any) -> Any:
    """The process group that `argument` is, or names; None where it is something else."""
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return torch.distributed.ProcessGroup.unbox(argument)
    if isinstance(argument, str):
        try:
            named: Any = argument
            return torch._C._distributed_c10d._resolve_process_group(named)
        except RuntimeError:  # how to reduce
            return None
    return argument if isinstance(argument, torch.distributed.ProcessGroup) else None


def release_default_group() -> None:
    """Leave no process group in the default arguments of torch.distributed.nn.functional, which Dynamo imports.

    They take the group that is the default when it is imported. Where that is after init_process_group, gloo's threads
    outlive destroy_process_group, and one that still frees a tensor as Python ends aborts the process (torch 2.13).
    With None, as when it is imported before, the functions use the group that is the default when they are called.
    """
    for function in vars(functional).values():
        if isinstance(function, FunctionType) and function.__defaults__:
            function.__defaults__ = tuple(
                None if isinstance(each, torch.distributed.ProcessGroup) else each
                for each in function.__defaults__
            )
