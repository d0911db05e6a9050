"""The product with a fault: `faulty.py KIND POINT NUMBER RANK words...`, under torchrun or in the warm ranks.

KIND is `kill`, `stop` (SIGSTOP), `hang` (an endless loop), `full` (no space left), `denied` (no permission), `nan` (the
weight of `tests/poison.py`) or `raise`.
POINT and NUMBER are as in `harness/runtime/faults.py`; NUMBER - is any. RANK - is every rank.
"""

import errno
import os
import signal
import sys

from harness.__main__ import main
from harness.runtime import faults
from tests import poison

kind, point, number, rank = sys.argv[1:5]


def fail(passed: str, passed_number: int) -> None:
    """Fail at the point that was asked for."""
    if (
        passed != point
        or number not in ("-", str(passed_number))
        or rank not in ("-", os.environ.get("RANK", "0"))
    ):
        return
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    while kind == "hang":
        pass
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    if kind == "denied":
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), point)
    if kind == "nan":
        poison.weight()
    if kind == "raise":
        raise ValueError("out of luck")


faults.inject = fail
sys.argv[1:] = sys.argv[5:]
raise SystemExit(main(sys.argv[1:]))
