"""What whole runs write is what the schema knows, and reading and writing it again changes nothing."""

import pytest

from tests.distributed.conftest import QUICK, Launch
from tests.keys import is_known

TRAIN = ("mode=train", *QUICK)
INFER = ("mode=infer", "generation.count=4", "generation.batch=1", "generation.max_new_tokens=4")
RUNS = {
    "training": (*TRAIN, "train.validate_every=1", "data.validation=0.2"),
    "training in stages": (*TRAIN, "pipeline.stages=2", "train.accumulation=2"),
    "phases": (*TRAIN, "ledger=phases"),
    "no ledger": (*TRAIN, "ledger=off"),
    "generation": INFER,
    "generation in stages": (*INFER, "pipeline.stages=2"),
    "continuous batching": (*INFER, "generation.batching=continuous", "generation.cache=paged"),
    "no cache": (*INFER, "generation.cache=none"),
}


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS.keys())
def test_the_schema_knows_every_key_that_a_run_writes(launch: Launch, words: tuple[str, ...]) -> None:
    is_known(launch(*words))
