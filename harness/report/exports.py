"""Exports runs to other tools: Perfetto, TensorBoard, Chakra, CSV and Parquet tables, Markdown."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.analysis.moves import transfers
from harness.analysis.moves.chakra import chakra
from harness.ledger.categories import CATEGORIES
from harness.runtime.files import put, whole
from harness.tables import escaped

if TYPE_CHECKING:
    import pyarrow as pa

    from harness.report.content import ReportedRun


LONGEST = 50
"""The most characters of a run's name in that of a directory: a file system takes 255 bytes."""


class Form(NamedTuple):
    """An export format: its line of help, and the function that writes it to a directory and returns the paths."""

    meaning: str
    write: Callable[[Sequence["ReportedRun"], Path], list[Path]]


def perfetto(runs: Sequence["ReportedRun"], directory: Path) -> list[Path]:
    """Chrome's trace event format: counter tracks by category and slices by phase, with one process for each rank.

    Timestamps are the run's own. A rehearsal has no times, so its events are one microsecond apart.
    """
    paths = []
    for index, run in enumerate(runs):
        events = [event for rank, table in run.traces() for event in _events(rank.rank, table)]
        paths.append(directory / f"perfetto{f'-{index}' * (len(runs) > 1)}.json")
        about = {"run": run.name, "directory": run.path}
        put(paths[-1], json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}))
    return paths


def _events(rank: int, table: "pa.Table") -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    live = dict.fromkeys(CATEGORIES, 0)
    phase_key: tuple[Any, ...] | None = None
    timestamp = start = 0.0
    for index, category in enumerate(columns["category"]):
        time = columns["nanoseconds"][index]
        timestamp = index if time is None else time / 1000
        current_key = columns["step"][index], columns["phase"][index], columns["micro_batch"][index]
        if current_key != phase_key:
            if phase_key is not None:
                yield _slice(rank, phase_key, start, timestamp)
            phase_key, start = current_key, timestamp
        if category is not None and columns["bytes"][index]:
            live[category] = live.get(category, 0) + columns["bytes"][index]
            yield {"ph": "C", "name": "bytes alive", "pid": rank, "ts": timestamp, "args": dict(live)}
    if phase_key is not None:
        yield _slice(rank, phase_key, start, timestamp)


def _slice(rank: int, phase_key: tuple[Any, ...], start: float, end: float) -> dict[str, Any]:
    step, phase, micro_batch = phase_key
    arguments = {"step": step, "micro_batch": micro_batch}
    return {
        "ph": "X",
        "name": phase,
        "pid": rank,
        "tid": 0,
        "ts": start,
        "dur": end - start,
        "args": arguments,
    }


def tensorboard(runs: Sequence["ReportedRun"], directory: Path) -> list[Path]:
    """TensorBoard's scalars of the worst rank by step: the peak of each category in MiB, and the losses.

    It names a run by its directory, so that of several runs each has one with the run's name.
    """
    try:
        from tensorboard.summary import Writer
    except ImportError:
        raise ValueError("--tensorboard: it needs TensorBoard; pip install 'harness[tensorboard]'") from None
    paths = []
    for index, run in enumerate(runs):
        name = re.sub(r"[^\w.=-]+", "_", run.name)[:LONGEST]
        paths.append(directory.joinpath("tensorboard", *([f"{index}-{name}"] if len(runs) > 1 else [])))
        writer = Writer(str(paths[-1]))
        for tag, figure, step in _scalars(run):
            writer.add_scalar(tag, figure, step)
        writer.close()
    return paths


def _scalars(run: "ReportedRun") -> Iterator[tuple[str, float, int]]:
    peaks: dict[tuple[str, int], int] = {}
    for phase in run.record.worst.phases:
        for name, figure in (("total", phase.peak), *phase.categories.items()):
            if figure is not None:
                peaks[name, phase.step] = max(figure, peaks.get((name, phase.step), 0))
    yield from ((f"memory/{name} (MiB)", figure / 2**20, step) for (name, step), figure in peaks.items())
    yield from (("loss", loss, step) for step, loss in enumerate(run.record.training.losses))


def tables(kind: str) -> Callable[[Sequence["ReportedRun"], Path], list[Path]]:
    """A function that writes all phases, transfers and events, each as a file of this `kind`, "csv" or "parquet"."""

    def write_tables(runs: Sequence["ReportedRun"], directory: Path) -> list[Path]:
        import pyarrow.csv
        import pyarrow.parquet

        write = pyarrow.csv.write_csv if kind == "csv" else pyarrow.parquet.write_table
        paths = []
        for name, rows in (("phases", phases(runs)), ("traffic", traffic(runs)), ("events", events(runs))):
            if rows.num_rows:
                paths.append(directory / f"{name}.{kind}")
                with whole(paths[-1]) as partial:
                    write(_without_formulas(rows) if kind == "csv" else rows, partial)
        return paths

    return write_tables


FORMULA = "^[=+@-]"
"""What a spreadsheet takes for the beginning of a formula."""


def _without_formulas(rows: "pa.Table") -> "pa.Table":
    """`rows`, with an apostrophe before each text that a spreadsheet would compute."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for index, field in enumerate(rows.schema):
        if pa.types.is_string(field.type):
            texts = pc.replace_substring_regex(rows.column(index), f"({FORMULA})", r"'\1")
            rows = rows.set_column(index, field.name, texts)
    return rows


def phases(runs: Sequence["ReportedRun"]) -> "pa.Table":
    """A row for each phase of each rank of each run, in bytes. Null: not measured."""
    import pyarrow as pa

    of_phases = [each for run in runs for rank in run.record.ranks for each in rank.phases]
    names = dict.fromkeys([*CATEGORIES, *(name for phase in of_phases for name in phase.categories)])
    rows = [
        {
            "run": run.name,
            "rank": rank.rank,
            "stage": rank.stage,
            "step": phase.step,
            "phase": phase.phase,
            "micro_batch": phase.micro_batch,
            "peak": phase.peak,
            "end": phase.end,
            **{_column(name): phase.categories.get(name) for name in names},
            "recomputed": phase.recomputed,
            "flops": None if phase.flops is None else float(phase.flops),
            "moved": None if phase.moved is None else float(phase.moved),
            "directory": run.path,
        }
        for run in runs
        for rank in run.record.ranks
        for phase in rank.phases
    ]
    return pa.Table.from_pylist(rows)


OTHERS = (
    *("run", "rank", "stage", "step", "phase", "micro_batch", "peak", "end"),
    *("recomputed", "flops", "moved", "directory"),
)
"""The columns of the phases' table that are no categories."""


def _column(category: str) -> str:
    """The column of a category; one of another version may be called as another column is."""
    return f"{category} (category)" if category in OTHERS else category


def traffic(runs: Sequence["ReportedRun"]) -> "pa.Table":
    """A row for each transfer of each rank of each run, in bytes; one without figures where nothing counted them."""
    import pyarrow as pa

    texts, places = ("run", "phase", "operation", "group", "link", "directory"), ("step", "micro_batch")
    columns = ("run", "rank", "stage", *TRANSFER, "directory")
    kinds = {name: pa.string() for name in texts} | {name: pa.int64() for name in ("rank", "stage", *places)}
    rows = [
        {
            "run": run.name,
            "rank": rank.rank,
            "stage": rank.stage,
            **{name: getattr(each, name, None) for name in TRANSFER},
            "directory": run.path,
        }
        for run in runs
        for rank in run.record.ranks
        for each in ([None] if rank.traffic is None else rank.traffic)
    ]
    columns_of = {name: [row[name] for row in rows] for name in columns}
    return pa.table(
        {
            name: pa.array(values, kinds[name])
            if name in kinds
            else pa.array([*map(_float, values)], pa.float64())
            for name, values in columns_of.items()
        }
    )


TRANSFER = (
    *("step", "phase", "micro_batch", "operation", "group", "ranks", "link"),
    *("calls", "bytes", "by_ring", "by_tree"),
)
"""The columns of a transfer. Its figures may be larger than an integer of a table."""


def _float(figure: Any) -> float | None:
    return None if figure is None else float(figure)


def events(runs: Sequence["ReportedRun"]) -> "pa.Table":
    """All events of every rank that has a trace, with columns for the run and the rank."""
    import pyarrow as pa

    tables_ = []
    for run in runs:
        for rank, table in run.traces():
            names = pa.array([run.name] * table.num_rows, pa.string())
            ranks = pa.array([rank.rank] * table.num_rows, pa.int32())
            tables_.append(table.add_column(0, "rank", ranks).add_column(0, "run", names))
    return pa.concat_tables(tables_) if tables_ else pa.table({})


def markdown(runs: Sequence["ReportedRun"], directory: Path) -> list[Path]:
    """The page's findings about each run, and the comparison, as Markdown."""
    from harness.advice.explain import explain
    from harness.analysis.compare import table
    from harness.record.fields import printable

    lines = ["# Memory report", ""]
    for run in runs:
        lines += [f"## {escaped(run.name)}", "", escaped(run.path), ""]
        lines += [*(f"- {escaped(printable(finding.sentence))}" for finding in explain(run.record)), ""]
        lines += [*_what_moves(run), ""]
    if len(runs) > 1:
        lines += ["## Side by side", "", table([run.run for run in runs], markdown=True), ""]
    put(directory / "report.md", "\n".join(lines))
    return [directory / "report.md"]


def _what_moves(run: "ReportedRun") -> Iterator[str]:
    """What a step or a batch moves as a table in Markdown; a sentence where it was not counted."""
    from harness.report import moves

    moved = transfers.worst(run.record)
    if moved is None:
        yield escaped(moves.absent(run))
        return
    yield f"What rank {moved.rank.rank} moves in its last {moves.unit(run.record)}:"
    yield ""
    for row in (moves.HEADINGS, ["---"] * len(moves.HEADINGS), *map(moves.cells, moves.rows(moved.rows))):
        yield f"| {' | '.join(escaped(cell) for cell in row)} |"


FORMS = {
    "perfetto": Form("a trace for ui.perfetto.dev: bytes by category, and phases", perfetto),
    "tensorboard": Form("TensorBoard's event files: the most in each step, by category", tensorboard),
    "chakra": Form("a step as Chakra's execution traces, for ASTRA-sim: chakra/chakra.RANK.et", chakra),
    "csv": Form("phases.csv, traffic.csv and events.csv", tables("csv")),
    "parquet": Form("phases.parquet, traffic.parquet and events.parquet", tables("parquet")),
    "markdown": Form("report.md, for an issue or a pull request", markdown),
}
"""The export formats, by the name of their option."""
