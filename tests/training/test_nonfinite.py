"""A loss or gradient that is NaN or infinite: seen before the update, in every engine and precision."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.runtime import faults
from harness.runtime.world import World
from tests import poison
from tests.training.conftest import train


def state(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """What the next step depends on, without the random state."""
    file = directory / f"state/step-{step:08d}/rank-00000.safetensors"
    return {name: each for name, each in load_file(file).items() if not name.startswith("random/")}


def once(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[], None], always: bool = False) -> None:
    """Let `spoil` happen in the forward of the second step; `always`: also where it is computed again."""
    calls: list[int] = []

    def inject(point: str, number: int) -> None:
        if (point, number) == ("forward", 1) and (always or not calls):
            calls.append(number)
            spoil()

    monkeypatch.setattr(faults, "inject", inject)


ENGINES = [
    "zero=0 precision=fp32",
    "zero=0 precision=fp32 train.clip=0",
    "zero=0 precision=bf16",
    "zero=1 precision=bf16 train.accumulation=2",
    "zero=2 precision=bf16",
    "zero=2 precision=fp32 train.clip=0",
    "zero=3 precision=bf16 train.accumulation=2",
    "zero=2 precision=bf16 zero.offload=optimizer",
    "zero=0 precision=fp32 optimizer=lion",
    "zero=0 precision=bf16 optimizer=muon",
    "zero=2 precision=bf16 optimizer=adamw_8bit",
]


@pytest.mark.parametrize("words", ENGINES)
def test_a_gradient_that_is_nan_skips_the_update_alone(
    world: World, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, poison.gradient)
    saves = ("train.nonfinite=skip", "train.save_every=1", "train.keep=3")
    results, said = train(world, tmp_path, *words.split(), *saves)
    assert results.training is not None
    assert results.training.skipped == [1]
    assert all(map(math.isfinite, results.training.losses))
    assert "step 2/3  its gradients are not finite: update skipped, 1 so far" in said
    first, second, third = (state(tmp_path, step) for step in (1, 2, 3))
    assert first.keys() == second.keys()
    assert all(torch.equal(each, second[name]) for name, each in first.items())
    assert any(not torch.equal(each, third[name]) for name, each in first.items())
    assert all(each.isfinite().all() for each in third.values() if each.is_floating_point())


@pytest.mark.parametrize("words", ENGINES)
def test_a_loss_that_is_nan_stops_before_the_update_at_the_module_that_made_it(
    world: World, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, poison.weight, always=True)
    results, said = train(world, tmp_path, *words.split(), "train.save_every=1")
    assert (
        f"forward 1: the loss is nan: {poison.PLACE} is the first module whose output is not finite" in said
    )
    assert "the update was left out" in said
    assert results.training is not None
    assert len(results.training.losses) == 1
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("words", ["zero=0 precision=fp32", "zero=2 precision=bf16", "zero=3 precision=bf16"])
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_weights_that_are_not_finite_are_not_saved_and_the_checkpoint_before_stays(
    world: World, words: str, nonfinite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inject(point: str, number: int) -> None:
        if (point, number) == ("step", 1):
            poison.masters()

    monkeypatch.setattr(faults, "inject", inject)
    saves = (f"train.nonfinite={nonfinite}", "train.save_every=1", "train.keep=1")
    results, said = train(world, tmp_path, *words.split(), *saves)
    problem = "is not finite after the update; no state of it is saved"
    assert re.search(rf"(weights|masters)/\S+ {problem}", said), said
    assert ("checkpoint 1: " in said) == (nonfinite == "stop")
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["step-00000001"]
    assert results.training is not None
    assert len(results.training.losses) == (2 if nonfinite == "stop" else 3)
    assert [each.step for each in results.training.unsaved] == ([] if nonfinite == "stop" else [2, 3])


def test_a_gradient_that_is_nan_under_a_finite_loss_stops_at_the_module_that_has_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, poison.gradient, always=True)
    _, said = train(world, tmp_path)
    place = poison.PLACE.rpartition(".")[0]  # whose output is the same tensor
    assert f"backward 1: the gradients are not finite: {place} is the first module in backward" in said


def test_without_the_check_a_run_goes_on_with_what_is_not_finite(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, poison.gradient)
    results, _ = train(world, tmp_path, "zero=0", "precision=fp32", "train.nonfinite=ignore")
    assert results.training is not None
    assert math.isnan(results.training.losses[2])


def test_an_overflow_of_the_optimizer_s_scalars_is_told_as_such(world: World, tmp_path: Path) -> None:
    _, said = train(world, tmp_path, "train.learning_rate=1e30", "train.betas=[0.9999999999,0.9]")
    assert "step 0: AdamW's learning rate 1e+30 over 1 - 0.9999999999 (of betas)" in said
    assert "lower train.learning_rate" in said


def test_a_learning_rate_that_is_too_high_stops_in_the_next_step(world: World, tmp_path: Path) -> None:
    results, said = train(world, tmp_path, "train.learning_rate=1e30")
    assert "is the first module" in said
    assert results.training is not None
    assert len(results.training.losses) == 1
