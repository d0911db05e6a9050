"""Renders the page: one file that opens from disk, loads nothing from a network, and escapes every text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.analysis import compare
from harness.analysis.summary import show
from harness.report import content, points
from harness.report.content import ReportedRun
from harness.tables import size

HERE = Path(__file__).parent


def html(runs: Sequence[ReportedRun]) -> str:
    """The report of `runs` as an HTML page. Raises ValueError for an incomplete trace."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["bytes"] = lambda figure: size(figure, exact=True)
    content_of_runs, traces = [], []
    for index, run in enumerate(runs):
        modules: list[dict[str, Any]] = []
        for rank, table in run.traces():
            trace = points.of_table(table)
            traces.append((f"trace-{index}-{rank.rank}", Markup(_script_safe_json(points.drawn(trace)))))
            if rank is run.record.worst:
                modules = content.modules(trace)
        content_of_runs.append(content.of_run(run, modules))
    data = {"runs": [_drawn(run) for run in content_of_runs], "comparison": content.comparison(runs)}
    return environment.get_template("page.html").render(
        runs=content_of_runs,
        table=_table(runs),
        differing=content.differing(runs),
        pairs=list(content.pairs(runs)),
        data=Markup(_script_safe_json(data)),
        traces=traces,
        css=Markup((HERE / "page.css").read_text("utf-8")),
        js=Markup((HERE / "page.js").read_text("utf-8")),
        plotly=Markup(get_plotlyjs()),
    )


def _drawn(run: dict[str, Any]) -> dict[str, Any]:
    """The parts of a run that the page's script needs; the template prints the rest."""
    return {name: run[name] for name in ("name", "worst", "ranks", "modules", "roofline")}


def _table(runs: Sequence[ReportedRun]) -> str:
    if len(runs) > 1:
        return compare.table([run.run for run in runs])
    return show(runs[0].raw)


def _script_safe_json(value: Any) -> str:
    """`value` as JSON in which no text can end the script element around it."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
