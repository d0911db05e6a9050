"""Which steps and tokens a run computes, and which a rehearsal leaves out."""

import pytest
from transformers import DynamicCache

from harness.config.strategy import LIKELIEST
from harness.generation.batch import Requests
from harness.generation.course import WHOLE
from harness.ledger import Ledger
from harness.rehearsal.course import Shortened

OFF = Ledger(mode="off")


@pytest.mark.parametrize("tokens", [2, 3, 9, 10, 11, 41])
def test_tokens_that_are_computed_and_tokens_that_are_left_out_are_all_tokens(tokens: int) -> None:
    batch = [(Requests([[1] * 5], [tokens]), DynamicCache())]
    after_the_first = range(1, tokens)
    assert list(WHOLE.turns(batch, LIKELIEST, OFF)) == [(number, 0) for number in after_the_first]
    ends = list(Shortened().turns(batch, LIKELIEST, OFF))
    assert len(ends) + sum(skipped for _, skipped in ends) == tokens - 1
    assert [number for number, _ in ends] == [
        *after_the_first[:4],
        *after_the_first[max(4, tokens - 5) :],
    ]


def test_batches_of_several_lengths_are_computed_whole() -> None:
    batches = [(Requests([[1]], [tokens]), DynamicCache()) for tokens in (20, 30)]
    assert list(Shortened().turns(batches, LIKELIEST, OFF)) == [(number, 0) for number in range(1, 30)]


def test_a_rehearsal_takes_the_steps_that_are_recorded() -> None:
    assert WHOLE.steps(range(3, 9), 2) == range(3, 9)
    assert Shortened().steps(range(3, 9), 2) == range(3, 5)
    assert Shortened().steps(range(3, 4), 2) == range(3, 4)
