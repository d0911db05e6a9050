"""A record of a loop that is not the harness's own, for the same tools: compare, report, check."""

import platform
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from harness.ledger import Ledger
from harness.record import record_file, trace
from harness.runtime.world import exchange

T = TypeVar("T")

MODES = ("train", "infer")


def save(ledger: Ledger, directory: str | Path, *, model: torch.nn.Module, mode: str = "train") -> Path:
    """Leave what `ledger` measured as a run's `record.json` and `trace/` in `directory`; the record's path.

    `mode` is what the loop did, "train" or "infer"; `model` is what it did it with, wrapped or not. Where
    torch.distributed is initialised every rank must call it, and rank 0 writes the books of them all.

    Raises ValueError, on every rank, for an unknown `mode`, a ledger whose block has not ended, and a directory that
    holds a record already or cannot be written.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: a loop is one of {', '.join(MODES)}")
    file = Path(directory) / record_file.FILE
    rank = dist.get_rank() if dist.is_initialized() else 0
    refused = "the ledger is still open: save its record after its block" if ledger.exact else None
    if rank == 0 and file.exists():
        refused = f"{directory} already holds a run's record; name another directory"
    _agree(refused)
    ranks = _gather(record_file.rank_record(ledger, rank))
    if rank == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            record_file.write(file.parent, _record(ledger, mode, model, ranks))
        except OSError as error:
            refused = f"{directory} cannot be written: {error.strerror}"
    _agree(refused)
    trace.write(file.parent, rank, trace.of_ledger(ledger))
    _agree(None)  # the files are there, whichever rank reads them
    return file


def _agree(refused: str | None) -> None:
    """Raise ValueError on every rank where one of them has a sentence."""
    for sentence in _gather(refused):
        if sentence is not None:
            raise ValueError(sentence)


def _gather(mine: T) -> list[T]:
    """Every rank's own, in rank order."""
    if not dist.is_initialized():
        return [mine]
    return exchange(mine, f"harness.save/{next(_turns)}")


_turns = count()
"""Exchanges so far, of which every rank makes the same."""


def _record(ledger: Ledger, mode: str, model: torch.nn.Module, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if ledger.device == "cuda" else platform.machine()
    return {
        "schema": record_file.SCHEMA,
        "status": "complete",
        "mode": mode,
        "world": {"kind": "loop", "size": len(ranks), "device": ledger.device, "device_name": name},
        "model": _described(model),
        "config": {},
        "environment": record_file.environment(),
        "ranks": ranks,
    }


def _described(model: torch.nn.Module) -> dict[str, Any]:
    """The record's `model`: the class that the wrappers wrap, its elements, which ZeRO-3 only remembers, and dtype."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    parameters = [*model.parameters()]
    return {
        "name": type(model).__name__,
        "parameters": sum(getattr(each, "ds_numel", each.numel()) for each in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
    }
