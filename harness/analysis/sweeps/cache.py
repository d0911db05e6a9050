"""`harness caching RUN RUN [...]`: what a KV cache saves and costs, by the number of generated tokens."""

import json
from collections.abc import Iterator, Mapping, Sequence

from harness.analysis.sweeps.point import Point, main_of
from harness.tables import Table, count, factor, seconds, size


def main(argv: Sequence[str]) -> int:
    """Run `harness caching RUN RUN [...]`; returns the exit code."""
    return main_of(
        argv,
        "caching",
        "Compare inference runs with a KV cache with runs without one, by the tokens they generated: time and "
        "operations "
        "a token, and bytes.",
        "launch/caching-study makes such runs.",
        lambda points, as_json: to_json(points) if as_json else as_text(points),
    )


def by_cache(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The runs by kind of cache, runs without a cache first; in each group by the number of generated tokens."""
    if len({(point.batch, point.prompt, point.model) for point in points}) > 1:
        raise ValueError(
            "caching: the runs differ in model, batch or prompt; name those that differ in length and cache"
        )
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda each: (each.cache != "none", each.cache, each.new)):
        groups.setdefault(point.cache, []).append(point)
    return groups


def saved(with_cache: Point, without: Point) -> int | None:
    """FLOPs that the cache saved over a whole decode; None: not counted."""
    if with_cache.flops is None or without.flops is None:
        return None
    return without.flops - with_cache.flops


def to_json(runs: Sequence[Point]) -> str:
    """The runs as JSON; null: not measured."""
    return json.dumps([point.as_dict() for points in by_cache(runs).values() for point in points], indent=1)


def as_text(runs: Sequence[Point]) -> str:
    """The table, and sentences about it."""
    groups = by_cache(runs)
    table = Table(
        ["new", "tokens"],
        ["seconds", "a token"],
        ["FLOP", "a token"],
        ["bytes", "a token"],
        ["KV", "cache"],
        ["lower", "bound"],
    )
    for cache, points in groups.items():
        table.section("without a cache" if cache == "none" else f"{cache} cache")
        for point in points:
            repeated = sum(each.new == point.new and each.rehearsed == point.rehearsed for each in points) > 1
            table.row(f"  {_row(point, repeated)}", *_cells(point))
    return "\n".join([table.text(), *_sentences(groups)])


def _row(point: Point, repeated: bool) -> str:
    """A row's name; `repeated`: others have as many new tokens and the same cache."""
    return point.name if repeated else "rehearsed" if point.rehearsed else "run"


def _cells(point: Point) -> Iterator[str]:
    yield f"{point.new:,}"
    yield seconds(point.each(point.decode_seconds))
    yield count(point.each(point.flops))
    yield size(point.each(point.moved))
    yield size(point.kv) if point.cache != "none" else "none"
    yield seconds(point.each(point.bound))


def _sentences(groups: Mapping[str, Sequence[Point]]) -> Iterator[str]:
    for cache, points in groups.items():
        few, many = points[0], points[-1]
        if many.new > few.new:
            name = "Without a cache" if cache == "none" else f"With a {cache} cache"
            changes = [
                f"takes {factor(few.each(few.decode_seconds), many.each(many.decode_seconds)) or 'as long'}",
                f"computes {factor(few.each(few.flops), many.each(many.flops)) or 'as much'}",
            ]
            yield f"{name}, from {few.new} to {many.new} new tokens, a token {' and '.join(changes)}."
    without = {point.new: point for point in groups.get("none", [])}
    for cache, points in groups.items():
        point = points[-1]
        other = without.get(point.new)
        saved_flops = saved(point, other) if other is not None and cache != "none" else None
        if saved_flops is not None and point.kv:
            yield (
                f"At {point.new} new tokens the {cache} cache of {size(point.kv)} saves {count(saved_flops, 'FLOP')}: "
                f"{count(saved_flops / point.kv, 'FLOP')} for each of its bytes."
            )
