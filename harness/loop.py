"""A record of a loop that is not the harness's own, for the same tools: compare, report, check."""

import platform
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness import record
from harness.ledger import Ledger

MODES = ("train", "infer")


def save(ledger: Ledger, directory: str | Path, *, model: torch.nn.Module, mode: str = "train") -> Path:
    """Leave what `ledger` measured as a run's `record.json` in `directory`, which is made; the file's path.

    `mode` is what the loop did, "train" or "infer"; `model` is what it did it with, wrapped or not. Where
    torch.distributed is initialised every rank must call it, and rank 0 writes the books of them all.

    Raises ValueError, on every rank, for an unknown `mode`, a ledger whose block has not ended, and a directory that
    holds a record already or cannot be made.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: a loop is one of {', '.join(MODES)}")
    directory = Path(directory)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    refused = "the ledger is still open: save its record after its block" if ledger.exact else None
    if rank == 0:
        refused = refused or _make(directory)
    told = _gather((refused, record.rank_record(ledger, rank)), size)
    for refused, _ in told:
        if refused is not None:
            raise ValueError(refused)
    if rank == 0:
        record.write(directory, _record(ledger, mode, model, [books for _, books in told]))
    return directory / record.FILE


def _make(directory: Path) -> str | None:
    """Make the run's directory; or say why not."""
    if (directory / record.FILE).exists():
        return f"{directory} already holds a run's record; name another directory"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{directory} cannot be made: {error.strerror}"
    return None


def _gather(mine: tuple[str | None, dict[str, Any]], size: int) -> list[tuple[str | None, dict[str, Any]]]:
    told = [mine] * size
    if size > 1:
        dist.all_gather_object(told, mine)
    return told


def _record(ledger: Ledger, mode: str, model: torch.nn.Module, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if ledger.device == "cuda" else platform.machine()
    return {
        "schema": record.SCHEMA,
        "status": "complete",
        "mode": mode,
        "world": {"kind": "loop", "size": len(ranks), "device": ledger.device, "device_name": name},
        "model": _described(model),
        "config": {},
        "environment": record.environment(),
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
