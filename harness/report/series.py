"""Many runs: a table of them, and memory against the few settings in which a series of them differs."""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.analysis.bars import present, stacked
from harness.analysis.labels import LONGEST, differing, settings_of, short, similar, telling, text_of
from harness.report.content import ReportedRun
from harness.tables import tail

FEWEST = 3
"""The fewest runs that are a series."""

MOST = 3
"""The most settings that a picture has."""

FILLED = 0.5
"""The least share of the settings' combinations that a picture has a run of."""

Axis = list[str]
"""Keys that change together."""


def series(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Each series among the runs: a row for each value of the setting with the most, panels for those of the others."""
    groups = [[(number, runs[number]) for number in group] for group in similar([run.record for run in runs])]
    found = [_series(group) for group in groups if len(group) >= FEWEST]
    return [each for each in found if each is not None]


def _series(group: Sequence[tuple[int, ReportedRun]]) -> dict[str, Any] | None:
    """None where no setting differs, or more than `MOST`; where two runs have the same values, or most have no run."""
    settings = [settings_of(run.record) for _, run in group]
    axes = sorted(_axes(settings), key=lambda axis: len({_point(each, axis) for each in settings}))
    if not 1 <= len(axes) <= MOST:
        return None
    panel_axis, row_axis = [key for axis in axes[:-1] for key in axis], axes[-1]
    points = [(_point(each, panel_axis), _point(each, row_axis)) for each in settings]
    places = dict(zip(points, group, strict=True))
    grid = len({panel for panel, _ in points}) * len({row for _, row in points})
    if len(places) < len(group) or len(places) < FILLED * grid:
        return None
    scale = max(run.record.worst.peak.bytes or 0 for _, run in group)
    return {
        "title": group[0][1].label.title,
        "against": ", ".join(" with ".join(map(short, axis)) for axis in reversed(axes)),
        "longest": max(len(_told(row, row_axis)) for _, row in places),
        "categories": present([run.record.worst.peak.categories for _, run in group]),
        "panels": [
            {
                "title": _told(panel, panel_axis),
                "rows": [
                    {"value": _told(row, row_axis), **_row(*places[panel, row], scale)}
                    for row in _ordered([row for of_panel, row in places if of_panel == panel])
                ],
            }
            for panel in _ordered([panel for panel, _ in places])
        ],
    }


def _row(number: int, run: ReportedRun, scale: int) -> dict[str, Any]:
    worst = run.record.worst
    return {
        "run": number,
        "name": run.name,
        "failed": run.record.status == "failed",
        "bar": stacked(worst.peak.categories, worst.peak.bytes, scale),
    }


def _axes(settings: Sequence[Mapping[str, Any]]) -> list[Axis]:
    """The keys in which runs differ; keys that separate the same runs are one axis."""
    axes: dict[tuple[int, ...], Axis] = {}
    for key in differing(settings):
        texts = [text_of(each.get(key)) for each in settings]
        axes.setdefault(tuple(texts.index(text) for text in texts), []).append(key)
    return list(axes.values())


Point = tuple[str, ...]


def _point(settings: Mapping[str, Any], axis: Axis) -> Point:
    return tuple(text_of(settings.get(key)) for key in axis)


def _told(point: Point, axis: Axis) -> str:
    return " ".join(f"{short(key)}={tail(value, LONGEST)}" for key, value in zip(axis, point, strict=True))


def _ordered(points: Sequence[Point]) -> list[Point]:
    """Different points: numbers by size, texts in the order of the runs."""
    unique = list(dict.fromkeys(points))
    return sorted(unique, key=lambda point: [_number(text) for text in point])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def table(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    """A row for each run: the settings that tell runs apart, and its peak by category in bytes. None: not measured."""
    settings = [settings_of(run.record) for run in runs]
    columns = _columns(runs, settings)
    peaks = [run.record.worst.peak for run in runs]
    scale = max((peak.bytes or 0 for peak in peaks), default=0)
    names = present([peak.categories for peak in peaks])
    return {
        "settings": [short(key) for key in columns],
        "categories": names,
        "rows": [
            {
                "run": number,
                "title": _rest(run, columns),
                "name": run.name,
                "failed": run.record.status == "failed",
                "settings": [text_of(each[key]) if key in each else "" for key in columns],
                "peak": peak.bytes,
                "bar": stacked(peak.categories, peak.bytes, scale),
                "categories": [peak.categories.get(name) for name in names],
                "where": str(peak.where or "-"),
                "path": run.path,
            }
            for number, (run, each, peak) in enumerate(zip(runs, settings, peaks, strict=True))
        ],
    }


def _columns(runs: Sequence[ReportedRun], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that are in the labels of the runs."""
    keys: dict[str, None] = {}
    for group in similar([run.record for run in runs]):
        keys.update(dict.fromkeys(telling([settings[number] for number in group])))
    return list(keys)


def _rest(run: ReportedRun, columns: Sequence[str]) -> str:
    """The label without the settings that have a column."""
    said = tuple(f"{short(key)}=" for key in columns)
    return " ".join([run.label.title, *(each for each in run.label.settings if not each.startswith(said))])
