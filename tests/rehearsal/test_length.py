"""A rehearsal that would take hours is refused, with a value that works; what a run may ask for otherwise is not."""

import pytest

from harness.config.compose import compose
from harness.config.load import Settings, load
from harness.config.refusal import Refusal
from harness.rehearsal import length
from harness.rehearsal.all_ranks import rehearsed

RUN = "mode=train model=tiny world=rehearsed world.size=2 hardware=cpu precision=fp32 train.validate_every=0"


def settings_of(words: str) -> Settings:
    return load(compose([*RUN.split(), *words.split()]))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("train.accumulation=100000", "train.accumulation"),
        ("train.accumulation=1000 pipeline.stages=2", "train.accumulation"),
        ("train.validate_every=1 train.validation_batches=100000", "train.validation_batches"),
        ("train.steps=1000000 ledger.steps=1000000", "ledger.steps"),
        ("train.steps=300 ledger.steps=300 train.accumulation=4", "ledger.steps"),
        ("train.steps=2 train.accumulation=600", "train.accumulation"),
    ],
)
def test_a_long_rehearsal_is_refused_with_a_value_that_works(words: str, key: str) -> None:
    with pytest.raises(Refusal, match=f"use {key}=") as refused:
        rehearsed(settings_of(words), (), parallel=False)
    fewer = refused.value.remedy.partition("; use ")[2].partition(":")[0]
    length.check(settings_of(f"{words} {fewer}"))


@pytest.mark.parametrize(
    "words",
    [
        "train.accumulation=170",
        "train.steps=1000000",
        "train.validate_every=100 train.validation_batches=100000",
        "mode=infer train.accumulation=100000",
    ],
)
def test_what_a_rehearsal_leaves_out_does_not_make_it_long(words: str) -> None:
    length.check(settings_of(words))
