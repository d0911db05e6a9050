"""The product, with an error of its own on rank 1 in the backward of its second step."""

import os
import sys

from harness.__main__ import main
from harness.data.batch import Batch
from harness.training import engine

if os.environ["RANK"] == "1":

    class Fails(engine.Engine):
        def _micro_step(self, batch: Batch, step: int, micro_batch: int) -> float:
            if step == 1:
                with self.ledger.phase("backward", step, micro_batch):
                    raise ValueError("out of luck")
            return super()._micro_step(batch, step, micro_batch)

    engine.Engine = Fails  # type: ignore[misc]

raise SystemExit(main(sys.argv[1:]))
