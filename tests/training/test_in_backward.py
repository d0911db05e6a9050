"""`train.optimizer_in_backward`: the same updates as after backward, and one gradient at a time."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.config.compose import compose
from harness.config.load import load
from harness.ledger import Ledger
from harness.model.plan import Plan
from harness.record.record_file import Output
from harness.record.results import Results
from harness.runtime import faults
from harness.runtime.world import World
from harness.training.train import run
from tests import poison
from tests.training.conftest import WORDS, train

BARE = ("zero=0", "train.clip=0", "train.learning_rate=0.01", "train.save_every=1", "train.keep=3")
EARLY = "train.optimizer_in_backward=true"
LAST = "state/step-00000003/rank-00000.safetensors"

KINDS = [
    "optimizer=adamw",
    "optimizer=sgd optimizer.momentum=0.9 model.config.tie_word_embeddings=true",
    "optimizer=adafactor checkpointing=selective",
    "optimizer=lion checkpointing=full loss=chunked",
    "optimizer=adamw_8bit train.nonfinite=ignore",
]


def trained(world: World, directory: Path, *words: str) -> tuple[list[float], Ledger]:
    """The losses of a run of three steps, and its ledger."""
    out, ledger = Output(directory, lambda _: None, Results(), lambda: None), Ledger(mode="exact", steps=3)
    with ledger:
        run(Plan.of(load(compose([*WORDS, *BARE, *words]))), world, ledger, out)
    assert out.results.training is not None
    return out.results.training.losses, ledger


def assert_same_state(left: Path, right: Path) -> None:
    one, other = load_file(left / LAST), load_file(right / LAST)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_as_after_backward_and_gradients_peak_at_the_largest(
    world: World, kind: str, tmp_path: Path
) -> None:
    words, late, early = kind.split(), tmp_path / "late", tmp_path / "early"
    losses, after = trained(world, late, *words)
    same, within = trained(world, early, *words, EARLY)
    assert same == losses
    assert_same_state(late, early)
    assert within.allocator.unattributed == 0
    weights = [each for name, each in load_file(early / LAST).items() if name.startswith("weights/")]
    assert after.categories["gradients"].peak == sum(each.nbytes for each in weights)
    assert within.categories["gradients"].peak == max(each.nbytes for each in weights)
    assert within.categories["optimizer"] == after.categories["optimizer"]
    assert within.categories["communication"].peak == 0  # DeepSpeed averages over this one rank otherwise
    shutil.rmtree((early / LAST).parent)
    assert trained(world, late / "again", *words, f"train.resume={early}")[0] == losses[2:]
    assert_same_state(late, late / "again")


def test_a_loss_that_is_nan_changes_no_weight_and_stops_at_the_module_that_made_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_second_step(monkeypatch, poison.weight)
    results, said = train(world, tmp_path, *BARE, EARLY)
    assert f"the loss is nan: {poison.PLACE} is the first module whose output is not finite" in said
    assert results.training is not None
    assert len(results.training.losses) == 1
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["step-00000001"]


def test_a_gradient_that_is_nan_is_not_used_and_the_sentence_says_what_was_updated_before(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_second_step(monkeypatch, poison.gradient)
    _, said = train(world, tmp_path, *BARE, EARLY)
    assert f"backward 1: the gradient of {poison.PLACE}.weight is not finite" in said
    assert "other weights were updated before it was there; the last checkpoint is as it was" in said
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["step-00000001"]


def at_the_second_step(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[], None]) -> None:
    monkeypatch.setattr(
        faults, "inject", lambda point, number: spoil() if (point, number) == ("forward", 1) else None
    )
