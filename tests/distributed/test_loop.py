"""A record of a loop on two ranks that the harness did not start."""

import os
import subprocess
from pathlib import Path

from harness import record, schema
from tests.distributed.conftest import LAUNCHER, ROOT

LOOP = """
import sys
import torch
import torch.distributed as dist
import harness

dist.init_process_group("gloo")
model = torch.nn.Linear(16, 8)
with harness.Ledger(model=model) as ledger:
    model(torch.ones(8 + 8 * dist.get_rank(), 16)).sum().backward()
try:
    harness.save(ledger, sys.argv[1], model=model)
except ValueError as error:
    print(f"rank {dist.get_rank()}: {error}", flush=True)
dist.destroy_process_group()
"""


def run(script: Path, directory: Path) -> list[str]:
    """What the loop prints on two ranks."""
    done = subprocess.run(
        [*LAUNCHER, "--nproc-per-node=2", str(script), str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(done.stdout.splitlines())


def test_one_record_holds_every_rank_s_books_and_a_second_is_refused_on_every_rank(tmp_path: Path) -> None:
    script, directory = tmp_path / "loop.py", tmp_path / "run"
    script.write_text(LOOP)
    assert run(script, directory) == []
    before = (directory / record.FILE).read_bytes()
    found = schema.parse(record.read(directory), "the record")
    assert (found.world.kind, found.world.size) == ("loop", 2)
    first, second = found.ranks
    assert (first.rank, second.rank) == (0, 1)
    assert (second.peak.bytes or 0) > (first.peak.bytes or 0) > 0  # of twice as many rows
    refused = f"{directory} already holds a run's record; name another directory"
    assert run(script, directory) == [f"rank 0: {refused}", f"rank 1: {refused}"]
    assert (directory / record.FILE).read_bytes() == before
