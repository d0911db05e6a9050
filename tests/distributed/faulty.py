"""The product with a fault: `faulty.py KIND POINT NUMBER RANK words...`, under torchrun or in the warm ranks.

KIND is `kill`, `stop` (SIGSTOP), `hang` (an endless loop), `full` (no space left), `denied` (no permission), `stale` (a
network disk has lost its answer), `small` (no file of more than 500 kB), `memory` (no more than a MiB from then on),
`nan`, `inf` (the weight of `tests/poison.py`, `inf` the master weights too), `raise`; `noted` kills when the record has
the place, `term` sends SIGTERM and goes on, `term-hang` sends it and hangs. With `full-on` and `denied-on` no file can
be written from the point on, to that of `room`; only torchrun's directory, on another disk, takes one. POINT and NUMBER
are as in `harness/runtime/faults.py`; NUMBER - is any. RANK - is every rank. After `and` comes another fault. Where the
variable ONCE names a file, a fault happens once, and leaves the file.
"""

import errno
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from harness.__main__ import main
from harness.runtime import faults

SYSTEM = {"full": errno.ENOSPC, "denied": errno.EACCES, "stale": errno.ESTALE}
"""The system's error of a kind."""

wanted = [sys.argv[1:5]]
del sys.argv[1:5]
while sys.argv[1:2] == ["and"]:
    wanted.append(sys.argv[2:6])
    del sys.argv[1:6]
lasting: list[str] = []
"""The kinds of `full-on` and `denied-on` whose point is passed."""


def record() -> dict[str, Any]:
    """The run's record as it is on disk."""
    from harness.record import record_file  # it imports torch: a rank watches for signals before that

    (directory,) = [word.partition("=")[2] for word in sys.argv if word.startswith("hydra.run.dir=")]
    return record_file.read(directory)


def fail(passed: str, passed_number: int) -> None:
    """Fail at the points that were asked for."""
    for kind, point, number, rank in wanted:
        if (
            passed == point
            and number in ("-", str(passed_number))
            and rank in ("-", os.environ.get("RANK", "0"))
        ):
            act(kind, passed, passed_number)
    if lasting and passed.startswith("write "):
        act(lasting[0], passed, passed_number)


def act(kind: str, point: str, number: int) -> None:
    """Fail in the way of `kind`."""
    if once := os.environ.get("ONCE"):
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    if kind == "noted":
        while record()["failure"]["where"] != {"step": number, "phase": point, "micro_batch": 0}:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    if kind.startswith("term"):
        os.kill(os.getpid(), signal.SIGTERM)
    while kind.endswith("hang"):
        pass
    if kind == "memory":
        limit = psutil.Process().memory_info().vms + 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if kind == "room":
        lasting.clear()
    if kind.endswith("-on"):
        lasting.append(kind.removesuffix("-on"))
    if kind == "small":
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    if kind in SYSTEM:
        raise OSError(SYSTEM[kind], os.strerror(SYSTEM[kind]), point)
    if kind in ("nan", "inf"):
        from tests import poison

        (poison.weight if kind == "nan" else poison.masters)()
    if kind == "raise":
        raise ValueError("out of luck")


faults.inject = fail
raise SystemExit(main(sys.argv[1:]))
