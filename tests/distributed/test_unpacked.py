"""Conversations, padded: a loss is the mean per label over all ranks and micro-batches, however these share a step."""

from pathlib import Path
from typing import Any

import pytest

from tests.chats import chatter, conversations
from tests.distributed.conftest import NARROW, Launch, Warm, complete

STEPS = 3
ALONE = ("train.micro_batch=4", "train.validation_batches=2")
SHARED = ("train.micro_batch=1", "train.accumulation=2", "train.validation_batches=4")
STAGES = ("train.micro_batch=2", "train.accumulation=2", "train.validation_batches=4", "pipeline.stages=2")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A request whose micro-batches have other numbers of labels each."""
    place = tmp_path_factory.mktemp("chat")
    (place / "chat.jsonl").write_text(conversations(40))
    chatter().save_pretrained(place / "tokenizer")
    return (
        *(
            "mode=train",
            *NARROW,
            "model.config.num_hidden_layers=2",
            "train.sequence=24",
            "train.export=false",
        ),
        *("data=chat", f"data.path={place}/chat.jsonl", f"data.tokenizer={place}/tokenizer"),
        *("data.packing=false", "data.validation=0.2", f"train.validate_every={STEPS}"),
        "train.schedule=constant",
    )


@pytest.fixture(scope="module")
def shared(launch: Launch, words: tuple[str, ...]) -> dict[str, Any]:
    """The record of two ranks."""
    return complete(launch(*words, *SHARED, f"train.steps={STEPS}"))


@pytest.mark.parametrize(("ranks", "layout"), [(1, ALONE), (2, STAGES)])
def test_losses_and_updates_do_not_depend_on_who_has_how_many_labels(
    launch: Launch, words: tuple[str, ...], shared: dict[str, Any], ranks: int, layout: tuple[str, ...]
) -> None:
    other = complete(launch(*words, *layout, f"train.steps={STEPS}", ranks=ranks))["training"]
    assert other["losses"] == pytest.approx(shared["training"]["losses"], rel=1e-5)  # sums in another order
    (own,), (theirs,) = shared["training"]["validation"], other["validation"]
    assert theirs["loss"] == pytest.approx(own["loss"], rel=1e-5)
    for key in ("tokens", "label_tokens", "padding_tokens", "cut_tokens"):
        assert other[key] == shared["training"][key] > 0


def test_what_is_padding_is_counted(shared: dict[str, Any]) -> None:
    training, speed = shared["training"], shared["performance"]
    positions = STEPS * 4 * 24
    assert training["tokens"] + training["padding_tokens"] == positions
    assert training["label_tokens"] < training["tokens"]
    assert speed["tokens_per_second"] < speed["padded_tokens_per_second"]
    assert all(rank["allocator"]["unattributed"] == 0 for rank in shared["ranks"])


def test_a_resumed_run_goes_on_at_its_place_to_the_bit_and_not_packed(
    launch: Launch, warm: Warm, words: tuple[str, ...], shared: dict[str, Any]
) -> None:
    first: Path = launch(*words, *SHARED, "train.steps=1", "train.save_every=1", "train.validate_every=0")
    after = complete(launch(*words, *SHARED, f"train.steps={STEPS}", f"train.resume={first}"))["training"]
    assert after["losses"] == shared["training"]["losses"][1:]
    assert after["validation"] == shared["training"]["validation"]
    sentence = warm.refused([*words, *SHARED, f"train.resume={first}", "data.packing=true"])
    assert sentence.startswith("harness: data.packing=true: ")
    assert "was saved with false" in sentence
