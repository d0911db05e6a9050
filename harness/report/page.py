"""The page: one file that opens from disk, asks the network for nothing, and shows every text as text."""

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
    """The report of `runs` as a page. Raises ValueError for a torn trace."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["bytes"] = lambda figure: size(figure, exact=True)
    told, traces = [], []
    for index, run in enumerate(runs):
        modules: list[dict[str, Any]] = []
        for rank, table in run.traces():
            trace = points.of_table(table)
            traces.append((f"trace-{index}-{rank.rank}", Markup(_inert(points.drawn(trace)))))
            if rank is run.record.worst:
                modules = content.modules(trace)
        told.append(content.of_run(run, modules))
    drawn = {"runs": [_drawn(run) for run in told], "comparison": content.comparison(runs)}
    return environment.get_template("page.html").render(
        runs=told,
        table=_table(runs),
        differing=content.differing(runs),
        pairs=list(content.pairs(runs)),
        data=Markup(_inert(drawn)),
        traces=traces,
        css=Markup((HERE / "page.css").read_text("utf-8")),
        js=Markup((HERE / "page.js").read_text("utf-8")),
        plotly=Markup(get_plotlyjs()),
    )


def _drawn(run: dict[str, Any]) -> dict[str, Any]:
    """What the page's script needs of a run; the rest is in its text."""
    return {name: run[name] for name in ("name", "worst", "ranks", "modules", "roofline")}


def _table(runs: Sequence[ReportedRun]) -> str:
    if len(runs) > 1:
        return compare.table([run.run for run in runs])
    return show(runs[0].raw)


def _inert(value: Any) -> str:
    """`value` as JSON that ends no script element, whatever texts are in it."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
