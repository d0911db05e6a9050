"""What a report says of runs, as plain data: from records and traces alone, with no torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import trace
from harness.bounds import bounds
from harness.compare import Run, names_of
from harness.explain import explain
from harness.record import read
from harness.report import points
from harness.roofline import machine, sentence
from harness.schema import Rank, Record, parse, printable
from harness.tables import size


@dataclass(frozen=True)
class Told:
    """A run, its raw record, and its name among the others."""

    run: Run
    raw: Mapping[str, Any]
    name: str

    @property
    def record(self) -> Record:
        return self.run.record

    @property
    def directory(self) -> Path:
        """Where its traces are."""
        return self.run.path if self.run.path.is_dir() else self.run.path.parent

    def traces(self) -> Iterator[tuple[Rank, Any]]:
        """Each rank that left a trace, and it. Raises ValueError for a torn one."""
        for rank in self.record.ranks:
            table = trace.read(self.directory, rank.rank)
            if table is not None:
                yield rank, table


def told(paths: Sequence[Path]) -> list[Told]:
    """The runs in `paths`. Raises ValueError where one has no record that can be read."""
    raws = [read(path) for path in paths]
    runs = [Run(path, parse(raw, str(path))) for path, raw in zip(paths, raws, strict=True)]
    return [Told(*each) for each in zip(runs, raws, names_of(runs), strict=True)]


def of_run(run: Told) -> dict[str, Any]:
    """Everything about one run but its traces."""
    record = run.record
    return {
        "name": run.name,
        "path": printable(str(run.run.path)),
        "title": _title(record),
        "mode": record.mode,
        "rehearsed": record.world.rehearsed,
        "failed": record.status == "failed",
        "findings": [printable(finding.sentence) for finding in explain(record)],
        "worst": record.worst.rank,
        "ranks": [_rank(rank) for rank in sorted(record.ranks, key=lambda rank: -(rank.peak.bytes or 0))],
        "modules": _modules(run),
        "roofline": _roofline(record),
        "config": dict(flat(run.raw.get("config", {}))),
        "environment": dict(flat(run.raw.get("environment", {}))),
    }


def _title(record: Record) -> str:
    parameters = record.model.parameters
    counted = "parameters not counted" if parameters is None else f"{parameters:,} parameters"
    rehearsed = ", rehearsed" * record.world.rehearsed
    return f"{record.title}{rehearsed}: {counted}, {record.model.dtype or '-'}, {record.world.devices}"


def _rank(rank: Rank) -> dict[str, Any]:
    where = rank.peak.where
    return {
        "rank": rank.rank,
        "called": _called(rank),
        "stage": rank.stage,
        "peak": rank.peak.bytes,
        "categories": dict(rank.peak.categories),
        "saved": rank.peak.saved,
        "highest": dict(rank.highest),
        "allocator": rank.allocator.peak,
        "unattributed": rank.allocator.unattributed,
        "where": f"step {where.step}, {where.phase}, micro-batch {where.micro_batch}" if where else None,
        "module": where.module if where else None,
    }


def _called(rank: Rank) -> str:
    others = len(rank.numbers) - 1
    return f"{rank.rank}" + (f" and {others} like it" if others else "")


def _modules(run: Told) -> list[dict[str, Any]]:
    """By module what is alive at the worst rank's peak, the largest first; empty where it left no trace."""
    table = trace.read(run.directory, run.record.worst.rank)
    if table is None:
        return []
    found = points.at_peak(table)
    rows = [{"module": name or "outside any module", **held} for name, held in found.items()]
    return sorted(rows, key=lambda row: -sum(held for held in row.values() if isinstance(held, int)))


def _roofline(record: Record) -> dict[str, Any] | None:
    found = bounds(record)
    if not found:
        return None
    return {
        "machine": machine(record.ceilings),
        "flops": record.ceilings.flops,
        "bandwidth": record.ceilings.bandwidth,
        "phases": [{**each.as_dict(), "sentence": sentence(each)} for each in found],
    }


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf by its path, `a.b`, as text."""
    for key, value in tree.items():
        path = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping):
            yield from flat(value, path)
        else:
            yield printable(path), printable(value if isinstance(value, str) else json.dumps(value))


def differing(runs: Sequence[Told]) -> dict[str, list[str]]:
    """The config's keys in which the runs differ, with each one's value; "-" where a run has no such key."""
    configs = [dict(flat(run.raw.get("config", {}))) for run in runs]
    keys = sorted({key for config in configs for key in config})
    values = {key: [config.get(key, "-") for config in configs] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def pairs(runs: Sequence[Told]) -> Iterator[dict[str, Any]]:
    """Each rehearsal beside each real run of the same config: where their figures differ, rank by rank."""
    for rehearsed in (run for run in runs if run.record.world.rehearsed):
        for real in (run for run in runs if not run.record.world.rehearsed):
            if _same(rehearsed, real):
                rows = [*_apart(rehearsed.record, real.record)]
                yield {
                    "rehearsed": rehearsed.name,
                    "real": real.name,
                    "compared": len(rows),
                    "differ": [row for row in rows if row["rehearsed"] != row["real"]],
                }


def _same(one: Told, other: Told) -> bool:
    ours, theirs = (
        {
            key: value
            for key, value in flat(run.raw.get("config", {}))
            if not key.startswith(("world.", "hardware."))
        }
        for run in (one, other)
    )
    return ours == theirs and one.record.world.size == other.record.world.size


def _apart(rehearsed: Record, real: Record) -> Iterator[dict[str, Any]]:
    """Each category's own peak and end on each rank that both have; `kernel` is in no rehearsal."""
    books = {number: rank for rank in rehearsed.ranks for number in rank.numbers}
    for rank in real.ranks:
        ours = books.get(rank.rank)
        if ours is None:
            continue
        for name, held in rank.categories.items():
            other = ours.categories.get(name)
            for figure in ("peak", "end"):
                yield {
                    "rank": rank.rank,
                    "figure": f"{name}, {figure}",
                    "rehearsed": getattr(other, figure, None),
                    "real": getattr(held, figure),
                }


def comparison(runs: Sequence[Told]) -> list[dict[str, Any]]:
    """At each run's peak, on its worst rank: bytes by category."""
    return [
        {
            "name": run.name,
            "mode": run.record.mode,
            "categories": dict(run.record.worst.peak.categories),
            "saved": run.record.worst.peak.saved,
            "total": run.record.worst.peak.bytes,
            "told": size(run.record.worst.peak.bytes),
        }
        for run in runs
    ]
