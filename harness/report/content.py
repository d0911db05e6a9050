"""A report's content as plain data, from records and traces alone. It imports no torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.advice.explain import explain
from harness.analysis.compare import Run, failures
from harness.analysis.labels import Label, labels
from harness.analysis.speed.roofline import machine, sentence
from harness.analysis.speed.roofline_model import bounds
from harness.analysis.summary import title
from harness.record import trace
from harness.record.fields import flat, printable
from harness.record.memory import Rank
from harness.record.record_file import read
from harness.record.schema import Record, parse
from harness.report import points


@dataclass(frozen=True)
class ReportedRun:
    """A run, its raw record, and a label that is unique among the runs."""

    run: Run
    raw: Mapping[str, Any]
    label: Label

    @property
    def name(self) -> str:
        """The label as one line."""
        return self.label.text

    @property
    def path(self) -> str:
        """Where the run is, in printable characters."""
        return printable(str(self.run.path))

    @property
    def record(self) -> Record:
        return self.run.record

    @cached_property
    def config(self) -> dict[str, str]:
        """The values of the config as text, by key."""
        return _texts(self.record.config)

    @property
    def directory(self) -> Path:
        """The directory of the run's traces."""
        return self.run.path if self.run.path.is_dir() else self.run.path.parent

    def traces(self) -> Iterator[tuple[Rank, Any]]:
        """Each rank that has a trace, with that trace's table. Raises ValueError for an incomplete trace."""
        for rank in self.record.ranks:
            table = trace.read(self.directory, rank.rank)
            if table is not None:
                yield rank, table


def runs_at(paths: Sequence[Path]) -> list[ReportedRun]:
    """The runs at `paths`. Raises ValueError where a record cannot be read."""
    raws = [read(path) for path in paths]
    runs = [Run(path, parse(raw, str(path))) for path, raw in zip(paths, raws, strict=True)]
    named = labels(paths, [run.record for run in runs])
    return [ReportedRun(*each) for each in zip(runs, raws, named, strict=True)]


def _texts(tree: Mapping[str, Any]) -> dict[str, str]:
    return {
        printable(path): printable(value if isinstance(value, str) else json.dumps(value))
        for path, value in flat(tree)
    }


def of_run(run: ReportedRun, modules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything about one run except its traces; `modules` are those of the worst rank."""
    record = run.record
    return {
        "name": run.name,
        "path": run.path,
        "title": title(record),
        "failed": [printable(sentence) for sentence in failures([record], [run.name])],
        "findings": [printable(finding.sentence) for finding in explain(record)],
        "worst": record.worst.rank,
        "ranks": [_rank(rank) for rank in sorted(record.ranks, key=lambda rank: -(rank.peak.bytes or 0))],
        "modules": modules,
        "roofline": _roofline(record),
        "config": run.config,
        "environment": _texts(record.environment.tree()),
    }


def _rank(rank: Rank) -> dict[str, Any]:
    where = rank.peak.where
    return {
        "rank": rank.rank,
        "called": _label(rank),
        "stage": rank.stage,
        "peak": rank.peak.bytes,
        "categories": dict(rank.peak.categories),
        "unattributed": rank.allocator.unattributed,
        "reserved": rank.allocator.reserved,
        "slack": rank.allocator.slack,
        "on host": None if rank.on_host is None else rank.on_host.activations,
        "where": f"step {where.step}, {where.phase}, micro-batch {where.micro_batch}" if where else None,
        "module": where.module if where else None,
    }


def _label(rank: Rank) -> str:
    others = len(rank.numbers) - 1
    return f"{rank.rank}" + (f" and {others} like it" if others else "")


def modules(trace: points.Trace) -> list[dict[str, Any]]:
    """The bytes alive at the trace's peak by module, the largest first."""
    by_module = points.at_peak(trace)
    largest = sorted(by_module, key=lambda name: -sum(by_module[name].values()))
    return [{"module": name or "outside any module", **by_module[name]} for name in largest]


def _roofline(record: Record) -> dict[str, Any] | None:
    phases = bounds(record)
    if not phases:
        return None
    return {
        "machine": machine(record.limits),
        "flops": record.limits.flops,
        "bandwidth": record.limits.bandwidth,
        "phases": [{**each.as_dict(), "sentence": sentence(each)} for each in phases],
    }


def differing(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """The config keys in which the runs differ, with the value of each run; "-" where a run has no such key."""
    configs = [run.config for run in runs]
    keys = sorted({key for config in configs for key in config})
    values = {key: [config.get(key, "-") for config in configs] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def pairs(runs: Sequence[ReportedRun]) -> Iterator[dict[str, Any]]:
    """Each pair of a rehearsal and a real run with the same config, and the figures in which they differ, by rank."""
    for rehearsed in (run for run in runs if run.record.world.rehearsed):
        for real in (run for run in runs if not run.record.world.rehearsed):
            if _same_config(rehearsed, real):
                rows = [*_figure_pairs(rehearsed.record, real.record)]
                yield {
                    "rehearsed": rehearsed.name,
                    "real": real.name,
                    "compared": len(rows),
                    "differ": [row for row in rows if row["rehearsed"] != row["real"]],
                }


def _same_config(one: ReportedRun, other: ReportedRun) -> bool:
    config, other_config = (
        {
            key: value
            for key, value in run.config.items()
            if not key.startswith(("world.", "hardware.", "network."))
        }
        for run in (one, other)
    )
    return config == other_config and one.record.world.size == other.record.world.size


def _figure_pairs(rehearsed: Record, real: Record) -> Iterator[dict[str, Any]]:
    """Each category's own peak and end on each rank that both runs have, in bytes. A rehearsal has no `kernel`."""
    rehearsed_ranks = {number: rank for rank in rehearsed.ranks for number in rank.numbers}
    for rank in real.ranks:
        rehearsed_rank = rehearsed_ranks.get(rank.rank)
        if rehearsed_rank is None:
            continue
        for name, figures in rank.categories.items():
            rehearsed_figures = rehearsed_rank.categories.get(name)
            for figure in ("peak", "end"):
                yield {
                    "rank": rank.rank,
                    "figure": f"{name}, {figure}",
                    "rehearsed": getattr(rehearsed_figures, figure, None),
                    "real": getattr(figures, figure),
                }
