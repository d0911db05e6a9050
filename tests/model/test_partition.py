"""How layers are shared out: every stage has some, all are there, and the worst stage is as light as it can be."""

import dataclasses
from itertools import combinations, pairwise, product
from random import Random

import pytest

from harness.config.compose import compose
from harness.config.load import Refusal, Settings, load
from harness.model.loader import model_config
from harness.model.partition import as_record, balanced, by_parameters, ranges, split_of, uniform
from harness.model.plan import Plan
from harness.rehearsal.balance import peak, resolved


def every_split(layers: int, stages: int) -> list[list[int]]:
    """All ways to give each of the stages a layer or more."""
    actual = []
    for ends in combinations(range(1, layers), stages - 1):
        bounds = [0, *ends, layers]
        actual.append([end - begin for begin, end in pairwise(bounds)])
    return actual


DECIDED = ("precision=bf16", "model.attention=sdpa")


def settings(*words: str) -> Settings:
    return load(compose(["mode=train", "hardware=cpu", *DECIDED, "world=rehearsed", *words]))


@pytest.mark.parametrize(("layers", "stages"), [(1, 1), (7, 3), (16, 16), (80, 8), (32, 5)])
def test_a_uniform_split_has_every_layer_and_no_stage_two_more_than_another(layers: int, stages: int) -> None:
    split = uniform(layers, stages)
    assert (len(split), sum(split)) == (stages, layers)
    assert 0 <= max(split) - min(split) <= 1
    assert split == sorted(split)  # the first keeps the most micro-batches, and is not the larger


def test_ranges_number_the_layers() -> None:
    assert ranges([1, 3, 2]) == [range(1), range(1, 4), range(4, 6)]


@pytest.mark.parametrize("seed", range(20))
def test_a_balanced_split_is_the_best_of_all(seed: int) -> None:
    random = Random(seed)
    layers, stages = random.randint(2, 8), random.randint(1, 4)
    stages = min(layers, stages)
    measured = {
        (stage, begin, end): random.randint(1, 30) + (end - begin) * random.randint(1, 9)
        for stage, begin, end in product(range(stages), range(layers), range(1, layers + 1))
        if begin < end
    }

    def worst(split: list[int]) -> int:
        return max(measured[stage, each.start, each.stop] for stage, each in enumerate(ranges(split)))

    actual = balanced(layers, stages, lambda stage, begin, end: measured[stage, begin, end])
    assert actual in every_split(layers, stages)
    assert worst(actual) == min(map(worst, every_split(layers, stages)))


def test_a_split_by_parameters_makes_room_for_the_embedding_and_the_head() -> None:
    given = settings("world.size=4", "pipeline.stages=4", "model.config.num_hidden_layers=12")
    config = model_config(given.model)
    assert by_parameters(config, 4) == [3, 3, 3, 3]  # they are smaller than a layer
    config.vocab_size = 20_000
    first, *middle, last = by_parameters(config, 4)
    assert max(first, last) < min(middle)


@pytest.mark.parametrize("requested", [[5], [1, 2], [1, 1, 2]])
def test_a_list_that_is_not_the_models_is_refused_where_only_the_model_tells(requested: list[int]) -> None:
    given = settings("world.size=2", "pipeline.stages=2")
    cut = dataclasses.replace(given, pipeline=dataclasses.replace(given.pipeline, split=requested))
    with pytest.raises(Refusal, match=r"pipeline\.split="):
        split_of(cut, model_config(given.model))


@pytest.mark.parametrize(
    ("stages", "micro_batches", "bubble"), [(4, 1, 3 / 4), (4, 12, 3 / 15), (2, 1, 1 / 2)]
)
def test_the_bubble_is_what_the_schedule_leaves_empty(stages: int, micro_batches: int, bubble: float) -> None:
    given = settings(
        f"world.size={stages}", f"pipeline.stages={stages}", f"train.accumulation={micro_batches}"
    )
    assert as_record(given, [1] * stages).bubble == bubble


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("zero=1", "train.accumulation=6"), marks=pytest.mark.exhaustive),
        ("zero=0", "train.accumulation=1", "precision=fp32"),
    ],
)
def test_a_split_by_memory_is_the_best_of_all_that_can_be_rehearsed(words: tuple[str, ...]) -> None:
    shape = (
        "world.size=2",
        "pipeline.stages=2",
        "model.config.num_hidden_layers=5",
        "train.steps=2",
        "train.sequence=64",
    )
    given = settings(*shape, "ledger.steps=2", "train.export=false", "pipeline.split=memory", *words)
    plan = Plan.of(given)
    actual = resolved(plan).split

    def worst(split: list[int]) -> int:
        cut = plan.with_settings(pipeline=dataclasses.replace(given.pipeline, split=split))
        return max(peak((cut, stage)) for stage in range(2))

    peaks = {tuple(split): worst(split) for split in every_split(5, 2)}
    assert peaks[tuple(actual)] == min(peaks.values())
    assert len(set(peaks.values())) == len(peaks)
