"""A run's trace: every birth and death of a storage on a rank, where it was and what it turned out to be.

One table a rank, `trace/rank-N.parquet` in the run's directory, in the order of events. Reading needs no torch.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from harness.ledger import Ledger
    from harness.ledger.events import Event

DIRECTORY = "trace"
COLUMNS = {
    "step": "int32",
    "phase": "text",
    "micro_batch": "int32",
    "module": "text",  # that was running
    "op": "text",  # that made the storage; empty for one an owner brought
    "category": "text",  # null: a phase begins
    "name": "text",  # an owner's; empty where none claims it
    "storage": "int32",  # the same number at birth and at death
    "bytes": "int64",  # by which the live set grows, or shrinks
    "saved": "int64",  # and by which what autograd keeps does
    "nanoseconds": "int64",  # since the first event; null in a rehearsal
}
"""What is known of an event."""


def of_ledger(ledger: "Ledger", timed: bool = True) -> "pa.Table":
    """Its events so far, one a row; none where it is not exact. With `timed=False` they have no time."""
    import pyarrow as pa

    events = ledger.events
    rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    numbers: dict[tuple[int, str], int] = {}
    began = events[0].time if events else 0
    for event in events:
        time = event.time - began if timed else None
        for row in _rows(event, numbers):
            for column, value in zip(rows.values(), (*event.where, event.module, *row, time), strict=True):
                column.append(value)
    return pa.table(rows, schema=schema())


def _rows(event: "Event", numbers: dict[tuple[int, str], int]) -> Iterator[tuple[Any, ...]]:
    """From `op` to `saved`: of a buffer in which many parameters lie a row for each."""
    storage = event.storage
    if storage is None:
        yield "", None, "", None, 0, 0
        return
    if event.saved or len(shares := storage.shares) == 1:
        shares = [(storage.name, abs(event.delta))]
    for index, (name, nbytes) in enumerate(shares):
        number = numbers.setdefault((id(storage), name), len(numbers))
        grown = nbytes if event.delta > 0 else -nbytes
        yield storage.op, storage.category, name, number, grown, 0 if index else event.saves


def schema() -> "pa.Schema":
    """`COLUMNS`, as Arrow has them."""
    import pyarrow as pa

    kinds = {name: pa.string() if kind == "text" else getattr(pa, kind)() for name, kind in COLUMNS.items()}
    return pa.schema(kinds.items())


def write(directory: Path, rank: int, table: "pa.Table") -> None:
    """Put a rank's `table` into a run's directory, whole or not at all; one with no events leaves nothing."""
    import pyarrow.parquet as pq

    if not table.num_rows:
        return
    file = _file(directory, rank)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, file)


def read(directory: Path, rank: int) -> "pa.Table | None":
    """A rank's table; None where the run left none. Raises ValueError for a file that is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = _file(directory, rank)
    if not file.exists():
        return None
    try:
        return pq.read_table(file, partitioning=None).select(list(COLUMNS)).cast(schema())
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is no trace: {str(error).splitlines()[0]}") from None


def _file(directory: Path, rank: int) -> Path:
    return directory / DIRECTORY / f"rank-{rank}.parquet"
