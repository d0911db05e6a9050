"""The record of a loop outside the harness, for the same tools: compare, report, check."""

import platform
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from harness.config import hardware_page
from harness.config.errors import first_line
from harness.ledger import Ledger
from harness.record import record_file, trace
from harness.record.links import Nodes
from harness.record.memory import Rank
from harness.record.places import as_path
from harness.record.results import Model
from harness.record.schema import Record, World
from harness.runtime.launcher import per_node
from harness.runtime.world import exchange

T = TypeVar("T")

MODES = ("train", "infer")


def save(ledger: Ledger, directory: str | Path, *, model: torch.nn.Module, mode: str = "train") -> Path:
    """Write what `ledger` measured as a run's `record.json` and `trace/` into `directory`. Returns the record's path.

    `mode` is what the loop did, "train" or "infer"; `model` is its model, wrapped or not. If torch.distributed is
    initialised, every rank must call this, and rank 0 writes the records of all ranks.

    Raises ValueError, on every rank, for an unknown `mode`, for a ledger whose block has not ended, and for a directory
    that already has a record or cannot be written.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: a loop is one of {', '.join(MODES)}")
    file = as_path(directory) / record_file.FILE
    rank = dist.get_rank() if dist.is_initialized() else 0
    _raise_on_all("the ledger is still open: save its record after its block" if ledger.exact else None)
    ranks = _gather_records(ledger, rank)
    whole = _record(ledger, mode, model, ranks) if rank == 0 else None
    _on_all(directory, partial(_begin, file, whole) if whole else None)
    try:
        _on_all(directory, lambda: trace.write(file.parent, rank, trace.of_ledger(ledger)))
        _on_all(directory, partial(record_file.write, file.parent, whole) if whole else None)
    except ValueError:
        trace.remove(file.parent, rank)
        if rank == 0:
            file.unlink(missing_ok=True)
        raise
    return file


def _begin(file: Path, whole: Record) -> None:
    """Make the directory of `file` this loop's: until all files are there, its record says failed. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not record_file.begin(file.parent, whole.plus(status="failed", failure=record_file.unfinished())):
        raise FileExistsError


def _on_all(directory: str | Path, act: Callable[[], object] | None) -> None:
    """Call this rank's `act`, if it has one. Raises ValueError, on every rank, where any of them cannot write."""
    error_sentence = None
    try:
        if act is not None:
            act()
    except OSError as error:
        reason = error.strerror
        error_sentence = (
            f"{directory} cannot be written: {reason}"
            if reason
            else f"{directory} already contains a run's record; name another directory"
        )
    _raise_on_all(error_sentence)


def _raise_on_all(error_sentence: str | None) -> None:
    """Raise ValueError on every rank if any rank passes a sentence."""
    for sentence in _gather(error_sentence):
        if sentence is not None:
            raise ValueError(sentence)


def _gather_records(ledger: Ledger, rank: int) -> list[Rank]:
    """The record of every rank. Raises ValueError on every rank if the figures of any rank are no record."""
    own: Rank | str
    try:
        own = record_file.rank_record(ledger, rank, nodes=_nodes(ledger))
    except ValueError as error:
        own = f"the ledger's figures make no record: {first_line(error)}"
    records: list[Rank] = []
    for each in _gather(own):
        if isinstance(each, str):
            raise ValueError(each)
        records.append(each)
    return records


def _nodes(ledger: Ledger) -> Nodes:
    """Where ranks are, as the launcher says, and what connects the GPUs of a node."""
    link = hardware_page.link_of(torch.cuda.get_device_name()) if ledger.device == "cuda" else None
    return Nodes(per_node(), ledger.device, link)


def _gather(value: T) -> list[T]:
    """The value of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    return exchange(value, f"harness.save/{next(_exchange_numbers)}")


_exchange_numbers = count()
"""Number of exchanges so far, the same on every rank."""


def _record(ledger: Ledger, mode: str, model: torch.nn.Module, ranks: list[Rank]) -> Record:
    name = torch.cuda.get_device_name() if ledger.device == "cuda" else platform.machine()
    return Record(
        status="complete",
        mode=mode,
        world=World(kind="loop", size=len(ranks), device=ledger.device, device_name=name),
        model=_model_record(model),
        config={},
        environment=record_file.environment(),
        ranks=ranks,
    )


def _model_record(model: torch.nn.Module) -> Model:
    """The record's `model`: the class inside all wrappers, its elements (ZeRO-3 stores only their number) and dtype."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    parameters = [*model.parameters()]
    return Model(
        name=type(model).__name__,
        parameters=sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
    )
