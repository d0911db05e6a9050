"""Collectives that repeat: frees after them happen in an order that no two runs would share."""

from typing import Any

import torch


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
