"""Layers for the stages of a pipeline by what each would hold: `pipeline.split=memory`, measured by rehearsing them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from harness.config.load import Settings
from harness.config.rules import check_split
from harness.model.loader import model_config
from harness.model.partition import balanced, ranges, uniform
from harness.rehearsal import decisive
from harness.rehearsal.one_rank import rehearse
from harness.rehearsal.representatives import roles

ROUNDS = 6
"""Splits that are tried after the uniform one; the second is mostly the last that is better."""

Task = tuple[Settings, int]
Measure = Callable[[Sequence[Task]], Sequence[int]]
Span = tuple[int, int, int]
"""A stage, its first layer and the one after its last."""


def resolved(settings: Settings, measure: Measure | None = None) -> Settings:
    """`settings` with a list of layers where they ask for `memory`. Raises Refusal as a rehearsal of them would.

    `measure` is `peak` of many tasks, in their order; one after another where it is not given.
    """
    if settings.pipeline.stages == 1 or settings.pipeline.split != "memory":
        return settings
    layers = model_config(settings.model).get_text_config(decoder=True).num_hidden_layers
    check_split(settings.pipeline, layers)
    return _with(settings, _by_memory(_short(settings), layers, measure or _in_turn))


def peak(task: Task) -> int:
    """The highest peak of a rank of a stage, in bytes, as far as the one with the most to hold tells."""
    settings, stage = task
    every = [role for role in roles(settings) if role.stage == stage]
    rank = max(every, key=lambda role: role.held).rank
    highest: int = rehearse(settings, rank)[0]["peak"]["bytes"]
    return highest


def _in_turn(tasks: Sequence[Task]) -> Sequence[int]:
    return [peak(task) for task in tasks]


def _short(settings: Settings) -> Settings:
    """What decides the peak of a step: the second has all that any has."""
    steps = 2 if settings.mode == "train" else 1
    settings = decisive(settings)
    train = replace(
        settings.train,
        steps=2,
        warmup_steps=0,
        validate_every=0,
        save_every=0,
        export=False,
        resume=None,
    )
    return replace(settings, train=train, ledger=replace(settings.ledger, mode="exact", steps=steps))


def _with(settings: Settings, split: list[int]) -> Settings:
    return replace(settings, pipeline=replace(settings.pipeline, split=split))


def _by_memory(settings: Settings, layers: int, measure: Measure) -> list[int]:
    """The split with the lowest worst peak of those that were measured."""
    stages = settings.pipeline.stages
    known: dict[Span, int] = {}
    tried: list[list[int]] = []

    def know(splits: Mapping[Span, list[int]]) -> None:
        wanted = {span: split for span, split in splits.items() if span not in known}
        tasks = [(_with(settings, split), span[0]) for span, split in wanted.items()]
        known.update(zip(wanted, measure(tasks), strict=True))

    split = uniform(layers, stages)
    know({**_spans(split), **_one_more(split)})
    while split not in tried and len(tried) <= ROUNDS:
        know(_spans(split))
        tried.append(split)
        split = balanced(layers, stages, lambda *span: _expected(known, span))
    return min(tried, key=lambda each: max(known[span] for span in _spans(each)))


def _spans(split: list[int]) -> dict[Span, list[int]]:
    return {(stage, each.start, each.stop): split for stage, each in enumerate(ranges(split))}


def _one_more(split: list[int]) -> dict[Span, list[int]]:
    """Each stage with a layer more, which the largest other gives."""
    found: dict[Span, list[int]] = {}
    for stage in range(len(split)):
        others = [other for other in range(len(split)) if other != stage]
        giver = max(others, key=lambda other: split[other])
        if split[giver] > 1:
            other = [n + (at == stage) - (at == giver) for at, n in enumerate(split)]
            span = ranges(other)[stage]
            found[stage, span.start, span.stop] = other
    return found


def _expected(known: Mapping[Span, int], span: Span) -> float:
    """What a stage of so many layers holds: measured, else on the line through the two nearest that were."""
    if span in known:
        return known[span]
    stage, begin, end = span
    layers = end - begin
    of_stage = {stop - start: held for (s, start, stop), held in known.items() if s == stage}
    nearest = sorted(of_stage, key=lambda number: (abs(number - layers), number))[:2]
    if len(nearest) < 2:
        return of_stage[nearest[0]]
    one, two = nearest
    slope = (of_stage[two] - of_stage[one]) / (two - one)
    return of_stage[one] + slope * (layers - one)
