"""`pipeline.split=memory`: spreads a pipeline's layers over its stages by their peaks, measured in rehearsals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from harness.config.rules import check_split
from harness.model.partition import balanced, ranges, uniform
from harness.model.plan import Plan
from harness.rehearsal import decisive
from harness.rehearsal.one_rank import rehearse
from harness.rehearsal.representatives import representatives_of

ROUNDS = 6
"""The most splits to try after the uniform one. Usually no split after the second is better."""

Task = tuple[Plan, int]
Measure = Callable[[Sequence[Task]], Sequence[int]]
Span = tuple[int, int, int]
"""A stage, its first layer and the one after its last."""


def resolved(plan: Plan, measure: Measure | None = None) -> Plan:
    """`plan` with `pipeline.split=memory` replaced by a list of layers. Raises Refusal as their rehearsal would.

    `measure` returns the `peak` of each task, in order; the default computes one after the other.
    """
    pipeline = plan.settings.pipeline
    if pipeline.stages == 1 or pipeline.split != "memory":
        return plan
    check_split(pipeline, plan.number_of_layers)
    return _with(plan, _lowest_peak_split(_short_run(plan), measure or _peaks_in_order))


def peak(task: Task) -> int:
    """The highest peak of a stage's ranks, in bytes: that of the representative expected to need the most memory."""
    plan, stage = task
    representatives = [
        representative for representative in representatives_of(plan) if representative.stage == stage
    ]
    rank = max(representatives, key=lambda representative: representative.size).rank
    return rehearse(plan, rank)[0].peak.bytes or 0


def _peaks_in_order(tasks: Sequence[Task]) -> Sequence[int]:
    return [peak(task) for task in tasks]


def _short_run(plan: Plan) -> Plan:
    """`plan` with only the steps that decide the peak: two in training, because the second step has all state."""
    settings = decisive(plan.settings)
    steps = 2 if settings.mode == "train" else 1
    train = replace(
        settings.train,
        steps=2,
        warmup_steps=0,
        validate_every=0,
        save_every=0,
        export=False,
        resume=None,
    )
    return plan.with_settings(train=train, ledger=replace(settings.ledger, mode="exact", steps=steps))


def _with(plan: Plan, split: list[int]) -> Plan:
    return plan.with_settings(pipeline=replace(plan.settings.pipeline, split=split))


def _lowest_peak_split(plan: Plan, measure: Measure) -> list[int]:
    """Of the measured splits, the one whose highest stage peak is the lowest."""
    layers, stages = plan.number_of_layers, plan.settings.pipeline.stages
    peaks: dict[Span, int] = {}
    tried_splits: list[list[int]] = []

    def measure_missing(splits: Mapping[Span, list[int]]) -> None:
        missing = {span: split for span, split in splits.items() if span not in peaks}
        tasks = [(_with(plan, split), span[0]) for span, split in missing.items()]
        peaks.update(zip(missing, measure(tasks), strict=True))

    split = uniform(layers, stages)
    measure_missing({**_spans(split), **_one_layer_more(split)})
    while split not in tried_splits and len(tried_splits) <= ROUNDS:
        measure_missing(_spans(split))
        tried_splits.append(split)
        split = balanced(layers, stages, lambda *span: _expected(peaks, span))
    return min(tried_splits, key=lambda each: max(peaks[span] for span in _spans(each)))


def _spans(split: list[int]) -> dict[Span, list[int]]:
    return {(stage, each.start, each.stop): split for stage, each in enumerate(ranges(split))}


def _one_layer_more(split: list[int]) -> dict[Span, list[int]]:
    """For each stage a split with one more layer on it, taken from the largest other stage."""
    longer: dict[Span, list[int]] = {}
    for stage in range(len(split)):
        others = [other for other in range(len(split)) if other != stage]
        donor = max(others, key=lambda other: split[other])
        if split[donor] > 1:
            new_split = [n + (index == stage) - (index == donor) for index, n in enumerate(split)]
            span = ranges(new_split)[stage]
            longer[stage, span.start, span.stop] = new_split
    return longer


def _expected(peaks: Mapping[Span, int], span: Span) -> float:
    """The peak of a stage with the layers in `span`: measured, else extrapolated from the two nearest layer counts."""
    if span in peaks:
        return peaks[span]
    stage, begin, end = span
    layers = end - begin
    peak_by_layers = {stop - start: peak for (s, start, stop), peak in peaks.items() if s == stage}
    nearest = sorted(peak_by_layers, key=lambda number: (abs(number - layers), number))[:2]
    if len(nearest) < 2:
        return peak_by_layers[nearest[0]]
    one, two = nearest
    slope = (peak_by_layers[two] - peak_by_layers[one]) / (two - one)
    return peak_by_layers[one] + slope * (layers - one)
