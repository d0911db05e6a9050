"""Trackers of others: what they have of a run is what its record has, and the run is the same without them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from harness.ledger import CATEGORIES
from tests.distributed.conftest import complete
from tests.tracked import READERS, Tracked

Launch = Callable[..., Path]

ALL = "tracker=[tensorboard,wandb,mlflow]"
WORDS = (
    *("mode=train", "train.steps=3", "ledger.steps=2", "train.sequence=64", "train.micro_batch=2"),
    *("train.validate_every=2", "train.validation_batches=1", "train.export=false"),
)


near = partial(pytest.approx, rel=1e-6)  # TensorBoard's figures have 24 bits


def without(names: Sequence[str], figures: dict[str, float]) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if name not in names}


@pytest.fixture(scope="module", params=READERS)
def tracked(request: pytest.FixtureRequest, launch: Launch) -> tuple[Path, Tracked]:
    """A short run on two ranks with all trackers, and what one of them has of it."""
    run = launch(*WORDS, ALL)
    return run, READERS[request.param](run)


def test_each_step_has_its_loss_its_rates_and_its_memory_by_category(tracked: tuple[Path, Tracked]) -> None:
    record, figures = complete(tracked[0]), tracked[1].figures
    training = record["training"]
    assert figures["train/loss"] == near(dict(enumerate(training["losses"], 1)))
    validation = {each["step"]: each["loss"] for each in training["validation"]}
    assert figures["validation/loss"] == near(validation)
    for name in ("learning_rate", "grad_norm", "tokens_per_second", "step_seconds"):
        assert [*figures[f"train/{name}"]] == [1, 2, 3]
        assert min(figures[f"train/{name}"].values()) > 0
    for step, peak in figures["memory/peak"].items():
        assert sum(figures[f"memory/at_peak/{name}"][step] for name in CATEGORIES) == near(peak)
    books = record["ranks"][0]
    kernel = books["peak"]["categories"]["kernel"]  # scratch inside operators is known only at the end
    assert max(figures["memory/peak"].values()) == near(books["peak"]["bytes"] - kernel)
    highest = {name: max(figures[f"memory/peak/{name}"].values()) for name in CATEGORIES}
    set_up = ("parameters", "workspace")  # which have their peak before the first step
    peaks = {name: each["peak"] for name, each in books["categories"].items()}
    assert without(set_up, highest) == near(without(set_up, peaks))
    assert all(highest[name] <= peaks[name] for name in set_up)


def test_what_is_not_measured_is_not_there(tracked: tuple[Path, Tracked]) -> None:
    figures = tracked[1].figures
    assert [*figures["memory/peak"]] == [*figures["memory/at_peak/activations"]] == [1, 2]  # ledger.steps
    assert [*figures["memory/owned/optimizer"]] == [3]
    end = complete(tracked[0])["ranks"][0]["categories"]["optimizer"]["end"]
    assert figures["memory/owned/optimizer"][3] == near(end)
    assert "memory/owned/activations" not in figures  # no owner has them
    assert "final/memory/reserved" not in figures


def test_the_end_has_the_records_own_figures_and_the_settings(tracked: tuple[Path, Tracked]) -> None:
    figures, settings, state, failure = tracked[1]
    record = complete(tracked[0])
    worst = max((rank["peak"] for rank in record["ranks"]), key=lambda peak: peak["bytes"])
    assert figures["final/memory/peak"] == near({3: worst["bytes"]})
    for name, nbytes in worst["categories"].items():
        assert figures[f"final/memory/at_peak/{name}"] == near({3: nbytes})
    assert figures["final/tokens_per_second"] == near({3: record["performance"]["tokens_per_second"]})
    chosen = {key: settings[key] for key in ("mode", "train.steps", "train.resume", "world.size")}
    assert chosen == {"mode": "train", "train.steps": "3", "train.resume": "null", "world.size": "2"}
    assert state in ("", "finished", "FINISHED")
    assert failure is None


def test_a_run_has_the_same_bytes_and_losses_with_trackers_and_without(launch: Launch) -> None:
    watched, alone = complete(launch(*WORDS, ALL)), complete(launch(*WORDS))
    assert watched["ranks"] == alone["ranks"]
    assert watched["training"] == alone["training"]


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_generation_sends_its_tokens_and_its_cache_batch_by_batch(launch: Launch, batching: str) -> None:
    words = ("mode=infer", "generation.count=8", "generation.batch=2", "generation.max_new_tokens=4")
    cache = ("generation.cache=paged", "generation.batching=continuous") if batching == "continuous" else ()
    run = launch(*words, *cache, "ledger.steps=1", "tracker=tensorboard")
    record, figures = complete(run), READERS["tensorboard"](run).figures
    tokens = [*figures["generate/tokens"].values()]
    assert tokens == sorted(tokens)
    assert 0 < tokens[-1] <= record["inference"]["new_tokens"]  # rank 0's are a half
    assert [*figures["generate/prompts"].values()] == [2, 4]
    assert max(figures["generate/kv_reserved"].values()) == near(record["inference"]["kv_reserved"])
    kernel = record["ranks"][0]["peak"]["categories"]["kernel"]
    assert figures["memory/peak"][1] == near(record["ranks"][0]["peak"]["bytes"] - kernel)
    cache_peak = record["ranks"][0]["categories"]["kv_cache"]["peak"]
    assert figures["memory/peak/kv_cache"][1] == near(cache_peak)
