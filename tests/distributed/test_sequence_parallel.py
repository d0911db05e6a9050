"""The collectives of sequence parallelism by torch's own styles, under a ledger, against what torchtitan#1369 shows."""

import json
from pathlib import Path

from tests.distributed import conftest

SHARD = 2_097_152
"""Elements of each message there: half of 8 x 2,048 tokens of 256."""


def test_a_layer_moves_the_messages_that_were_published(warm: conftest.Warm, tmp_path: Path) -> None:
    script, out = Path(__file__).with_name("sequence_parallel.py"), tmp_path / "moved.json"
    warm.run([str(script), str(out)], ranks=2, directory=tmp_path)
    moved = json.loads(out.read_text())["moved"]
    passes = [each for each in moved if each[0] != "step"]
    assert {(operation, nbytes) for _, operation, nbytes, _ in passes} == {
        ("all-gather", 2 * SHARD * 4),
        ("reduce-scatter", 2 * SHARD * 4),
    }
    assert sum(calls for *_, calls in passes) == 12
    assert ["step", "all-reduce", 256 * 4, 3] in moved  # the gradient of a norm's weight on all ranks
