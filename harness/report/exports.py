"""The same runs for other tools: Perfetto, TensorBoard, tables, Markdown."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.ledger.categories import CATEGORIES
from harness.record.record_file import put
from harness.tables import escaped

if TYPE_CHECKING:
    import pyarrow as pa

    from harness.report.content import ReportedRun


class Form(NamedTuple):
    """A form of a report: what it is, and what writes it into a directory and says which files those are."""

    meaning: str
    write: Callable[[Sequence["ReportedRun"], Path], list[Path]]


def perfetto(runs: Sequence["ReportedRun"], directory: Path) -> list[Path]:
    """Counter tracks by category and slices by phase, a process for each rank: Chrome's trace event format.

    Time is the run's own; a rehearsal has none, and its events are a microsecond apart.
    """
    made = []
    for index, run in enumerate(runs):
        events = [event for rank, table in run.traces() for event in _events(rank.rank, table)]
        made.append(directory / _called("perfetto", index, runs, "json"))
        put(made[-1], json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return made


def _events(rank: int, table: "pa.Table") -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    live = dict.fromkeys(CATEGORIES, 0)
    place: tuple[Any, ...] | None = None
    moment = began = 0.0
    for index, category in enumerate(columns["category"]):
        time = columns["nanoseconds"][index]
        moment = index if time is None else time / 1000
        here = columns["step"][index], columns["phase"][index], columns["micro_batch"][index]
        if here != place:
            if place is not None:
                yield _slice(rank, place, began, moment)
            place, began = here, moment
        if category is not None and columns["bytes"][index]:
            live[category] = live.get(category, 0) + columns["bytes"][index]
            yield {"ph": "C", "name": "bytes alive", "pid": rank, "ts": moment, "args": dict(live)}
    if place is not None:
        yield _slice(rank, place, began, moment)


def _slice(rank: int, place: tuple[Any, ...], began: float, ended: float) -> dict[str, Any]:
    step, phase, micro_batch = place
    told = {"step": step, "micro_batch": micro_batch}
    return {"ph": "X", "name": phase, "pid": rank, "tid": 0, "ts": began, "dur": ended - began, "args": told}


def tensorboard(runs: Sequence["ReportedRun"], directory: Path) -> list[Path]:
    """Scalars of the worst rank, in MiB by step: the most in a step, by category; and the losses."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        raise ValueError("--tensorboard: it needs TensorBoard; pip install 'harness[tensorboard]'") from None
    made = []
    for index, run in enumerate(runs):
        made.append(directory / _called("tensorboard", index, runs))
        writer = Writer(str(made[-1]))
        for tag, figure, step in _scalars(run):
            writer.add_scalar(tag, figure, step)
        writer.close()
    return made


def _scalars(run: "ReportedRun") -> Iterator[tuple[str, float, int]]:
    most: dict[tuple[str, int], int] = {}
    for phase in run.record.worst.phases:
        for name, held in (("total", phase.peak), *phase.categories.items()):
            if held is not None:
                most[name, phase.step] = max(held, most.get((name, phase.step), 0))
    yield from ((f"memory/{name} (MiB)", held / 2**20, step) for (name, step), held in most.items())
    yield from (("loss", loss, step) for step, loss in enumerate(run.record.training.losses))


def tables(kind: str) -> Callable[[Sequence["ReportedRun"], Path], list[Path]]:
    """What writes every phase of every rank, a row each, and each rank's events, as `kind` of file."""

    def write_tables(runs: Sequence["ReportedRun"], directory: Path) -> list[Path]:
        import pyarrow.csv
        import pyarrow.parquet

        put = pyarrow.csv.write_csv if kind == "csv" else pyarrow.parquet.write_table
        made = []
        for name, found in (("phases", phases(runs)), ("events", events(runs))):
            if found.num_rows:
                made.append(directory / f"{name}.{kind}")
                put(found, made[-1])
        return made

    return write_tables


def phases(runs: Sequence["ReportedRun"]) -> "pa.Table":
    """A row for each phase of each rank of each run, in bytes; what was not measured is null."""
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
            **{name: phase.categories.get(name) for name in names},
            "recomputed": phase.recomputed,
            "flops": None if phase.flops is None else float(phase.flops),
            "moved": None if phase.moved is None else float(phase.moved),
        }
        for run in runs
        for rank in run.record.ranks
        for phase in rank.phases
    ]
    return pa.Table.from_pylist(rows)


def events(runs: Sequence["ReportedRun"]) -> "pa.Table":
    """Every event of every rank that left a trace, under its run and rank."""
    import pyarrow as pa

    found = []
    for run in runs:
        for rank, table in run.traces():
            named = pa.array([run.name] * table.num_rows, pa.string())
            numbered = pa.array([rank.rank] * table.num_rows, pa.int32())
            found.append(table.add_column(0, "rank", numbered).add_column(0, "run", named))
    return pa.concat_tables(found) if found else pa.table({})


def markdown(runs: Sequence["ReportedRun"], directory: Path) -> list[Path]:
    """What the page says, as text: what stands out in each run, and the comparison."""
    from harness.advice.explain import explain
    from harness.analysis.compare import table
    from harness.record.schema import printable

    lines = ["# Memory report", ""]
    for run in runs:
        lines += [f"## {escaped(run.name)}", "", escaped(run.record.title), ""]
        lines += [*(f"- {escaped(printable(finding.sentence))}" for finding in explain(run.record)), ""]
    if len(runs) > 1:
        lines += ["## Side by side", "", table([run.run for run in runs], markdown=True), ""]
    put(directory / "report.md", "\n".join(lines))
    return [directory / "report.md"]


def _called(kind: str, index: int, runs: Sequence["ReportedRun"], ending: str = "") -> str:
    number = f"-{index}" if len(runs) > 1 else ""
    return f"{kind}{number}{'.' * bool(ending)}{ending}"


FORMS = {
    "perfetto": Form("a trace for ui.perfetto.dev: bytes by category, and phases", perfetto),
    "tensorboard": Form("TensorBoard's event files: the most in each step, by category", tensorboard),
    "csv": Form("phases.csv and events.csv", tables("csv")),
    "parquet": Form("phases.parquet and events.parquet", tables("parquet")),
    "markdown": Form("report.md, for an issue or a pull request", markdown),
}
"""What a report can be beside its page."""
