"""A record of a loop on two ranks that the harness did not start."""

import os
import subprocess
from pathlib import Path

from harness.record import record_file, schema
from tests.distributed.conftest import LAUNCHER, ROOT, Warm

LOOP = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
import harness

dist.init_process_group("gloo")
model = torch.nn.Linear(16, 8)
with harness.Ledger(model=model) as ledger:
    model(torch.ones(8 + 8 * dist.get_rank(), 16)).sum().backward()
harness.save(ledger, sys.argv[1], model=model)
dist.barrier()
before = (Path(sys.argv[1]) / "record.json").read_bytes()
dist.barrier()
try:
    harness.save(ledger, sys.argv[1], model=model)
except ValueError as error:
    sys.stdout.write(f"rank {dist.get_rank()}: {error}\\n")
dist.barrier()
assert (Path(sys.argv[1]) / "record.json").read_bytes() == before
dist.destroy_process_group()
"""

THREADS = """
import sys
from pathlib import Path
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

class Collectives(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d.") and not str(function).startswith("c10d.barrier"):
            sys.stdout.write(f"rank {dist.get_rank()}: {function}\\n")
        return function(*args, **(kwargs or {}))

dist.init_process_group("gloo")
import harness, torch
model = torch.nn.Linear(16, 8)
with harness.Ledger(model=model) as ledger:
    model(torch.ones(8, 16)).sum().backward()
with Collectives():
    harness.save(ledger, sys.argv[1], model=model)
rank = dist.get_rank()
dist.destroy_process_group()
threads = [(each / "comm").read_text().strip() for each in Path("/proc/self/task").iterdir()]
sys.stdout.write(f"rank {rank}: {[each for each in threads if 'gloo' in each]}\\n")
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


def test_one_record_holds_every_rank_s_books_and_a_second_is_refused_on_every_rank(
    warm: Warm, tmp_path: Path
) -> None:
    script, directory = tmp_path / "loop.py", tmp_path / "run"
    script.write_text(LOOP)
    refused = f"{directory} already contains a run's record; name another directory"
    said = warm.run([str(script), str(directory)], directory=tmp_path).splitlines()
    assert sorted(line for line in said if line.startswith("rank ")) == [
        f"rank {n}: {refused}" for n in (0, 1)
    ]
    actual = schema.parse(record_file.read(directory), "the record")
    assert (actual.world.kind, actual.world.size) == ("loop", 2)
    first, second = actual.ranks
    assert (first.rank, second.rank) == (0, 1)
    assert (second.peak.bytes or 0) > (first.peak.bytes or 0) > 0  # of twice as many rows


def test_a_group_s_threads_end_with_it_and_none_is_given_a_tensor_by_us(tmp_path: Path) -> None:
    """A thread of gloo's that frees a tensor as Python ends aborts the process."""
    script = tmp_path / "loop.py"
    script.write_text(THREADS)
    assert run(script, tmp_path / "run") == ["rank 0: []", "rank 1: []"]
