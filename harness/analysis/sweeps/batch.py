"""`harness batching RUN RUN [...]`: what a larger batch costs and gains in generation, by the context.

A step's time is split as in Chen, "Dissecting Batching Effects in GPT Inference" (2023). The part that does not depend
on the context is that of the dense layers, which read their weights once for all sequences. The part that a longer
context adds is that of attention, which reads each sequence's own cache.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from harness.analysis.sweeps.point import Point, main_of
from harness.tables import Table, factor, seconds, size

WIDTH = 20
"""Characters of the longest bar."""


class Step(NamedTuple):
    """A run, and the seconds of its step above those with the shortest context; None: not measured."""

    point: Point
    attention: float | None


def main(argv: Sequence[str]) -> int:
    """Run `harness batching RUN RUN [...]`; returns the exit code."""
    return main_of(
        argv,
        "batching",
        "Compare inference runs by their batch and context: tokens a second, time from one token to "
        "the next, "
        "and KV cache.",
        "launch/batching-study makes such runs.",
        lambda points, as_json: to_json(points) if as_json else as_text(points),
    )


def steps(points: Sequence[Point]) -> list[Step]:
    """The runs by context, then batch."""
    ordered = sorted(points, key=lambda point: (point.context, point.batch))
    for one, other in pairwise(ordered):
        if (one.context, one.batch) == (other.context, other.batch):
            names = f"{one.name} and {other.name}"
            raise ValueError(f"batching: {names} have one batch and one context; name each point once")
    if len({(point.cache, point.rehearsed, point.model) for point in ordered}) > 1:
        raise ValueError("batching: the runs are of several models, caches, or kinds; name those of one")
    shortest = {point.batch: point for point in reversed(ordered)}
    return [Step(point, _context_seconds(point, shortest[point.batch])) for point in ordered]


def _context_seconds(point: Point, shorter: Point) -> float | None:
    if point is shorter or point.step_seconds is None or shorter.step_seconds is None:
        return None
    return point.step_seconds - shorter.step_seconds


Counted = tuple[float, float, float]
"""A batch size, and the FLOPs and bytes of a step with it."""


def crossing(one: Counted, other: Counted, balance: float) -> float:
    """The smallest compute-bound batch on a machine with a `balance` in FLOP/B; infinite where there is none.

    FLOPs and bytes are both linear in the batch, so the counts of two batches give those of any batch.
    """
    (b1, f1, m1), (b2, f2, m2) = one, other
    flops, moved = (f2 - f1) / (b2 - b1), (m2 - m1) / (b2 - b1)
    fixed_flops, fixed = f1 - flops * b1, m1 - moved * b1
    gained = flops - balance * moved
    return max(1.0, (balance * fixed - fixed_flops) / gained) if gained > 0 else float("inf")


def turn(one: Point, other: Point) -> float | None:
    """`crossing` from the counts of two runs of one context; None without counts, or if both have the same batch."""
    if None in (one.flops, one.moved, other.flops, other.moved, one.balance) or one.batch == other.batch:
        return None
    first, second = ((each.batch, each.flops or 0, each.moved or 0) for each in (one, other))
    return crossing(first, second, one.balance or 0.0)


def to_json(points: Sequence[Point]) -> str:
    """The table as JSON; null: not measured."""
    rows = [{**step.point.as_dict(), "attention_seconds": step.attention} for step in steps(points)]
    return json.dumps(rows, indent=1)


def as_text(points: Sequence[Point]) -> str:
    """The table, with bars of one scale, and sentences about it."""
    ordered = steps(points)
    fastest = max((step.point.tokens_per_second or 0 for step in ordered), default=0)
    table = Table(
        ["tokens/s"],
        ["from token", "to token"],
        ["of it", "the context's"],
        ["KV", "cache"],
        ["counted", "FLOP/B"],
        [""],
    )
    by_context: dict[int, list[Step]] = {}
    for step in ordered:
        by_context.setdefault(step.point.context, []).append(step)
    for context, of_context in by_context.items():
        table.section(f"{context:,} tokens of context")
        for step in of_context:
            table.row(*_cells(step, fastest))
    return "\n".join([table.text(), *_sentences(by_context)])


def _cells(step: Step, fastest: float) -> Iterator[str]:
    point = step.point
    yield f"  batch {point.batch}{', rehearsed' * point.rehearsed}"
    yield "-" if point.tokens_per_second is None else f"{point.tokens_per_second:,.0f}"
    yield seconds(point.step_seconds)
    yield seconds(step.attention)
    yield size(point.kv)
    yield "-" if point.intensity is None else f"{point.intensity:.2f}"
    length = round(WIDTH * (point.tokens_per_second or 0) / fastest) if fastest else 0
    yield ("#" * length or "." * bool(point.tokens_per_second)).ljust(WIDTH)


def _sentences(by_context: Mapping[int, Sequence[Step]]) -> Iterator[str]:
    for context, ordered in by_context.items():
        few, many = ordered[0].point, ordered[-1].point
        if few.step_seconds and many.step_seconds and many.batch > few.batch:
            yield (
                f"At {context:,} tokens of context a step of {many.batch} sequences takes "
                f"{many.step_seconds / few.step_seconds:.2f} times one of {few.batch}, for "
                f"{many.batch / few.batch:g} times the tokens."
            )
        one, other = ordered[0].attention, ordered[-1].attention
        if one and other and one > 0 and other > 0:
            yield f"  What the longer context adds grows {factor(one, other)}: each sequence has its own cache to read."
    for context, ordered in by_context.items():
        crossover_batch = turn(ordered[0].point, ordered[-1].point)
        if crossover_batch is not None:
            yield _prediction(context, crossover_batch, ordered[0].point)


def _prediction(context: int, batch: float, point: Point) -> str:
    balance = f"the machine's {point.balance:,.0f} FLOP/B"
    if batch == float("inf"):
        return f"Predicted at {context:,} tokens: no batch is compute-bound; what a sequence adds is below {balance}."
    return f"Predicted at {context:,} tokens: compute-bound from a batch of {batch:,.0f} on, by {balance}."
