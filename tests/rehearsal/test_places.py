"""Where a rehearsal is: a total that is known from the start, and a place that only moves on."""

from pathlib import Path

import pytest

from harness.config import compose
from harness.config.load import load
from harness.ledger import Where
from harness.model.plan import Plan
from harness.model.resolve import resolve
from harness.rehearsal.one_rank import rehearse
from harness.rehearsal.places import Distance, Place, leave, left
from harness.rehearsal.representatives import Representative

TINY = ("world=rehearsed", "hardware=cpu", "precision=fp32", "train.export=false", "train.sequence=32")


def plan_of(*words: str) -> Plan:
    return resolve(load(compose.compose([*TINY, *words])))


def at(step: int, phase: str, micro_batch: int = 0, layer: int | None = None) -> Place:
    return Place(Where(step, phase, micro_batch), "" if layer is None else f"model.layers.{layer}.mlp")


def test_each_micro_batch_passes_each_layer_forward_and_backward() -> None:
    plan = plan_of("mode=train", "world.size=1", "train.steps=2", "train.accumulation=2")
    distance = Distance(plan, Representative(0, (0,)))
    assert distance.total == 2 * 2 * 2 * 4
    assert distance.to(at(0, "setup")) == 0
    passed = []
    for step in range(2):
        for micro_batch in range(2):
            passed += [distance.to(at(step, "forward", micro_batch, layer)) for layer in range(4)]
            passed += [distance.to(at(step, "backward", micro_batch, layer)) for layer in reversed(range(4))]
    assert passed == [*range(32)]
    assert distance.to(at(1, "step")) == 32
    assert distance.to(at(2, "checkpoint")) == 32


def test_a_stage_of_a_pipeline_counts_its_own_layers_and_never_goes_back() -> None:
    words = ("mode=train", "pipeline.stages=2", "world.size=2", "train.steps=1", "train.accumulation=3")
    distance = Distance(plan_of(*words), Representative(1, (1,), stage=1))
    assert distance.total == 3 * 2 * 2
    interleaved = [
        *(at(0, "forward", 0, 2), at(0, "forward", 0, 3), at(0, "forward", 1, 2), at(0, "forward", 1, 3)),
        *(at(0, "backward", 0, 3), at(0, "backward", 0, 2), at(0, "forward", 2, 2), at(0, "forward", 2, 3)),
        *(at(0, "backward", 1, 3), at(0, "backward", 2, 2), at(0, "step")),
    ]
    passed = [distance.to(place) for place in interleaved]
    assert passed == sorted(passed)
    assert passed[-1] == distance.total


@pytest.mark.parametrize(
    ("words", "batches"),
    [
        ("generation.count=6 generation.batch=2", 3),
        ("generation.count=6 generation.batch=2 world.size=2", 2),
        ("generation.prompt=[a,b,c] generation.batch=2", 2),
        ("generation.count=60 generation.batch=2", 3),  # ledger.steps
    ],
)
def test_generation_passes_the_layers_once_for_each_batch(words: str, batches: int) -> None:
    plan = plan_of("mode=infer", "world.size=1", *words.split())
    distance = Distance(plan, Representative(0, (0,)))
    assert distance.total == batches * 4
    assert distance.to(at(0, "prefill", layer=3)) == 3
    assert distance.to(at(0, "decode", layer=1)) == 3
    assert distance.to(at(1, "prefill", layer=0)) == 4


def test_a_place_goes_from_one_process_to_another_through_a_file(tmp_path: Path) -> None:
    assert left(tmp_path / "0") is None
    leave(tmp_path / "0", at(1, "forward", 2, 3))
    assert left(tmp_path / "0") == at(1, "forward", 2, 3)
    (tmp_path / "0").write_text("{")
    assert left(tmp_path / "0") is None
    leave(tmp_path / "no" / "folder", at(0, "forward"))  # what cannot be shown does not end the rehearsal


def test_a_rehearsal_that_is_looked_at_has_the_same_bytes() -> None:
    plan, seen = plan_of("mode=train", "world.size=2", "train.steps=3"), list[Place]()
    looked_at, _ = rehearse(plan, 0, report=seen.append)
    alone, _ = rehearse(plan, 0)
    assert looked_at.tree() == alone.tree()
    assert seen
