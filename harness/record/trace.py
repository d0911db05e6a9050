"""A run's trace: every allocation and free of a storage on a rank, where it happened, and the storage's category.

One table per rank, `trace/rank-N.parquet` in the run's directory, in the order of events. Reading needs no torch.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.errors import first_line
from harness.record.fields import printable
from harness.record.places import check_inside
from harness.runtime.files import folder, put

if TYPE_CHECKING:
    import pyarrow as pa

    from harness.ledger import Ledger
    from harness.ledger.events import Event

DIRECTORY = "trace"
COLUMNS = {
    "step": "int64",
    "phase": "text",
    "micro_batch": "int64",
    "module": "text",  # the running module
    "op": "text",  # that allocated the storage; empty if an owner named it first
    "category": "text",  # null: a phase begins
    "name": "text",  # from an owner; empty if none claims it
    "storage": "int32",  # the same number at allocation and free
    "bytes": "int64",  # change of the live bytes
    "saved": "int64",  # change of the bytes that autograd keeps
    "nanoseconds": "int64",  # since the first event; null in a rehearsal
}
"""The columns of the table."""

OPEN = ("category", "storage", "nanoseconds")
"""The columns that may be null."""

AMOUNTS = ("bytes", "saved")
HIGHEST = 2**50
"""The most bytes of one event."""

MOST = 10_000_000
"""The most events of a file that is read: a tool has all of them in memory."""


def of_ledger(ledger: "Ledger", timed: bool = True) -> "pa.Table":
    """The ledger's events so far, one per row; none if it is not exact. With `timed=False` they have no time."""
    import pyarrow as pa

    events = ledger.events
    rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    numbers: dict[tuple[int, str], int] = {}
    start = events[0].time if events else 0
    for event in events:
        time = event.time - start if timed else None
        for row in _rows(event, numbers):
            for column, value in zip(rows.values(), (*event.where, event.module, *row, time), strict=True):
                column.append(value)
    return pa.table(rows, schema=schema())


def _rows(event: "Event", numbers: dict[tuple[int, str], int]) -> Iterator[tuple[Any, ...]]:
    """The columns `op` to `saved`. A buffer of several parameters has one row for each."""
    storage = event.storage
    if storage is None:
        yield "", None, "", None, 0, 0
        return
    if event.saved or len(shares := storage.shares) == 1:
        shares = [(storage.name, abs(event.delta))]
    for index, (name, nbytes) in enumerate(shares):
        number = numbers.setdefault((id(storage), name), len(numbers))
        change = nbytes if event.delta > 0 else -nbytes
        yield storage.op, storage.category, name, number, change, 0 if index else event.saves


def schema() -> "pa.Schema":
    """`COLUMNS` as an Arrow schema."""
    import pyarrow as pa

    kinds = {name: pa.string() if kind == "text" else getattr(pa, kind)() for name, kind in COLUMNS.items()}
    return pa.schema(kinds.items())


def write(directory: Path, rank: int, table: "pa.Table") -> None:
    """Write a rank's `table` into a run's directory, completely or not at all. Without events there is no file.

    Raises NotWritten.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not table.num_rows:
        return
    file = _file(directory, rank)
    content = pa.BufferOutputStream()
    pq.write_table(table, content, compression="zstd")
    folder(file.parent)
    put(file, content.getvalue().to_pybytes())


def remove(directory: Path, rank: int) -> None:
    """Delete a rank's table, if there is one."""
    if (directory / DIRECTORY).is_symlink():
        return
    with suppress(OSError):
        _file(directory, rank).unlink(missing_ok=True)
        (directory / DIRECTORY).rmdir()


def read(directory: Path, rank: int) -> "pa.Table | None":
    """A rank's table. None if the run left none. Raises ValueError for a file that is not a trace."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = _file(directory, rank)
    if not file.exists():
        return None
    check_inside(directory, file)
    try:
        with pq.ParquetFile(file) as parquet:  # read_table would import pandas
            if parquet.metadata.num_rows > MOST:
                raise ValueError(f"it has {parquet.metadata.num_rows:,} events, more than {MOST:,}")
            return _checked(parquet.read().select(list(COLUMNS)).cast(schema()))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is not a trace: {first_line(error)}") from None


def _checked(table: "pa.Table") -> "pa.Table":
    """`table`, with texts that are printable. Raises ValueError for a value that no event has."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table.validate(full=True)
    for index, name in enumerate(COLUMNS):
        column = table.column(name)
        if column.null_count and name not in OPEN:
            raise ValueError(f"{name} is null in {column.null_count} of {table.num_rows} events")
        if name in AMOUNTS and table.num_rows and not _moderate(column):
            raise ValueError(f"{name} has a value that is no number of bytes")
        if pa.types.is_string(column.type):
            table = table.set_column(index, name, _printable(column))
    if table.column("nanoseconds").null_count not in (0, table.num_rows):
        raise ValueError("nanoseconds is null in some events, and not in all")
    if not pc.all(pc.equal(table.column("category").is_null(), table.column("storage").is_null())).as_py():
        raise ValueError("an event has a category without a storage, or a storage without one")
    return table


def _moderate(column: "pa.ChunkedArray") -> bool:
    """Whether each value may be the bytes of an event."""
    import pyarrow.compute as pc

    ends = pc.min_max(column).as_py()
    return bool(ends["min"] >= -HIGHEST and ends["max"] <= HIGHEST)


def _printable(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """The texts of `column` in printable characters."""
    import pyarrow as pa

    encoded = column.combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    shown = [printable(text) for text in texts]
    if shown == texts:
        return column
    texts = pa.array(shown, pa.string())  # this imports pandas
    return pa.chunked_array([pa.DictionaryArray.from_arrays(encoded.indices, texts).cast(pa.string())])


def _file(directory: Path, rank: int) -> Path:
    return directory / DIRECTORY / f"rank-{rank}.parquet"
