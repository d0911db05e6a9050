"""Renders the page: one file that opens from disk, loads nothing from a network, and escapes every text."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.analysis import bars, compare
from harness.analysis.summary import show
from harness.report import content, contrast, moves, points, series
from harness.report.content import ReportedRun

HERE = Path(__file__).parent

BESIDE = 2
"""How many runs a table has beside the first, so that it fits a sheet of paper."""

SCRIPTS = ("page.js", "runs.js", "paper.js")
"""One script of the page, in this order."""


def html(runs: Sequence[ReportedRun]) -> str:
    """The report of `runs` as an HTML page. Raises ValueError for an incomplete trace."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    content_of_runs, traces = [], []
    for index, run in enumerate(runs):
        modules: list[dict[str, Any]] = []
        for rank, table in run.traces():
            trace = points.of_table(table)
            traces.append((f"trace-{index}-{rank.rank}", Markup(_script_safe_json(points.drawn(trace)))))
            if rank is run.record.worst:
                modules = content.modules(trace)
        content_of_runs.append(content.of_run(run, modules))
    data = {"runs": [_drawn(run) for run in content_of_runs], "looks": bars.plain()}
    return (
        bars.templates(HERE)
        .get_template("page.html")
        .render(
            runs=content_of_runs,
            contrast=contrast.contrast(runs),
            series=series.series(runs),
            moves=moves.moves(runs),
            summary=series.table(runs),
            tables=list(_tables(runs)),
            differing=content.differing(runs),
            pairs=list(content.pairs(runs)),
            data=Markup(_script_safe_json(data)),
            traces=traces,
            css=Markup((HERE / "page.css").read_text("utf-8")),
            looks=Markup(bars.css()),
            js=Markup("\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)),
            plotly=Markup(get_plotlyjs()),
        )
    )


def _drawn(run: dict[str, Any]) -> dict[str, Any]:
    """The parts of a run that the page's script needs; the template prints the rest."""
    return {name: run[name] for name in ("name", "worst", "ranks", "modules", "roofline")}


def _tables(runs: Sequence[ReportedRun]) -> Iterator[str]:
    """One run's figures, or several side by side: where they are many, a few at a time, each with the first."""
    if len(runs) == 1:
        yield show(runs[0].raw)
        return
    first, *others = [run.run for run in runs]
    for few in batched(others, BESIDE):
        yield compare.table([first, *few])


def batched(items: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """`items` in lists of `count`, the last perhaps shorter."""
    return (items[start : start + count] for start in range(0, len(items), count))


def _script_safe_json(value: Any) -> str:
    """`value` as JSON in which no text can end the script element around it."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
