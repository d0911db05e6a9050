"""Every request is planned, or refused by a sentence: drawn by seed, and by name what was once neither."""

from random import Random

import pytest

from harness.config.refusal import Refusal, as_typed
from tests.fuzzed import refused, request

COUNT = 1000
WHOLE = 20
"""Every so many-th request goes through Hydra; every so many-th small one is rehearsed."""

TRAIN = "mode=train model=tiny world=rehearsed world.size=2 hardware=cpu precision=fp32"
INFER = TRAIN.replace("train", "infer", 1)


@pytest.mark.parametrize("part", range(4))
def test_a_request_is_planned_or_refused_by_one_printable_sentence(part: int) -> None:
    sentences = set()
    for number in range(part, COUNT, 4):
        words = request(Random(number))
        try:
            sentence = refused(words, whole=number % WHOLE == part, small=number % WHOLE == part)
        except Exception as error:
            raise AssertionError(f"request {number}: {' '.join(words)}") from error
        if sentence is not None:
            assert sentence.isprintable(), words
            assert len(sentence) < 1000, words
            sentences.add(sentence)
    assert len(sentences) > 50, "the requests are refused for too few reasons to prove anything"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (f"{TRAIN} data=[1,2]", "data=[1,2]: no such option; one of chat, hub, stdlib, text"),
        (
            f"{TRAIN} checkpointing={{a:1}}",
            "checkpointing={a:1}: no such option; one of full, none, selective",
        ),
        (f"{TRAIN} zero={'[' * 40}{']' * 40}", "no such option; one of 0, 1, 2, 3"),
        (f"{TRAIN} train.accumulation='\x1b[2J'", "train.accumulation=?[2J: should be a valid integer"),
        (f"{TRAIN} world='\u202eabc'", "world=?abc: no such option"),
        (f"{TRAIN} train.micro_batch=4000000000", "should be less than or equal to 1048576"),
        (f"{TRAIN} train.validation_batches=9007199254740991", "should be less than or equal to 1048576"),
        (f"{TRAIN} train.accumulation=9007199254740991", "should be less than or equal to 1048576"),
        (f"{INFER} generation.count=100000000", "should be less than or equal to 1048576"),
        (f"{INFER} generation.max_new_tokens=9007199254740000", "should be less than 2147483648"),
        (f"{INFER} generation.pages=9007199254740991", "should be less than 2147483648"),
        (f"{TRAIN} model.config.vocab_size=9007199254740991", "should be 16,777,216 or less"),
        (f"{TRAIN} model.config.intermediate_size=9007199254740991", "should be 16,777,216 or less"),
        (f"{TRAIN} model.config.intermediate_size=0", "should be a whole number, 1 or more"),
        (f"{TRAIN} model.config.hidden_size=-256", "should be a whole number, 1 or more"),
        (f"{TRAIN} model.config.num_attention_heads=0", "should be a whole number, 1 or more"),
        (f"{TRAIN} model.config.num_hidden_layers=1000000", "should be 10,000 or less"),
        (f"{TRAIN} zero=2 zero.allgather_bucket_size=4999999", "needs an even number; use 5000000"),
        (f"{TRAIN} train.learning_rate=nan", "train.learning_rate=nan: should be"),
        (f"{TRAIN} train.clip=inf", "train.clip=inf: should be"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_key(words: str, sentence: str) -> None:
    assert sentence in (refused(words.split(), small=False) or "it was planned")


def test_a_number_that_is_no_float_is_refused() -> None:
    from harness.config.rules import widths

    with pytest.raises(Refusal, match="rope_theta"):
        widths.check({"rope_theta": 10**400}, "")


def test_a_long_or_deep_value_is_shortened_in_a_sentence() -> None:
    deep: object = 1
    for _ in range(2000):
        deep = [deep]
    assert "..." in as_typed(deep)
    assert len(str(Refusal("key", "x" * 100_000, "leave it out"))) < 400
