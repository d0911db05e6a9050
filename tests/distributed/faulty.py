"""The product with a fault: `faulty.py KIND POINT NUMBER RANK words...`, under torchrun or in the warm ranks.

KIND is `kill`, `stop` (SIGSTOP), `hang` (an endless loop), `full` (no space left), `denied` (no permission),
`memory` (no more than a MiB from then on) or `raise`.
POINT and NUMBER are as in `harness/runtime/faults.py`; NUMBER - is any. RANK - is every rank. Where the variable ONCE
names a file, the fault happens once, and leaves the file.
"""

import errno
import os
import resource
import signal
import sys
from pathlib import Path

import psutil

from harness.__main__ import main
from harness.runtime import faults

kind, point, number, rank = sys.argv[1:5]


def fail(passed: str, passed_number: int) -> None:
    """Fail at the point that was asked for."""
    if (
        passed != point
        or number not in ("-", str(passed_number))
        or rank not in ("-", os.environ.get("RANK", "0"))
    ):
        return
    if once := os.environ.get("ONCE"):
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    while kind == "hang":
        pass
    if kind == "memory":
        limit = psutil.Process().memory_info().vms + 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    if kind == "denied":
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), point)
    if kind == "raise":
        raise ValueError("out of luck")


faults.inject = fail
sys.argv[1:] = sys.argv[5:]
raise SystemExit(main(sys.argv[1:]))
