"""What a training run does with its batches."""

import weakref

import torch

from harness.data.batch import Batch
from harness.ledger import Ledger
from harness.training.reading import Reported


def test_a_batch_that_was_read_is_counted_and_kept_by_its_user_alone() -> None:
    with Ledger(mode="phases") as ledger:
        batches = Reported((Batch(torch.ones(2, 8, dtype=torch.int64)) for _ in range(2)), ledger)
        batch = next(batches)
        alive = weakref.ref(batch.tokens)
        del batch
        assert alive() is None
        assert [amount for amounts in ledger.traffic.amounts().values() for amount in amounts.values()] == [
            (1, 64)
        ]
