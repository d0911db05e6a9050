"""The product with a fault: `faulty.py KIND POINT NUMBER RANK words...`, under torchrun or in the warm ranks.

KIND is `kill`, `stop` (SIGSTOP), `hang` (an endless loop), `full` (no space left), `denied` (no permission) or `raise`;
`noted` kills when the record has the place, `term` sends SIGTERM and goes on, `term-hang` sends it and hangs.
POINT and NUMBER are as in `harness/runtime/faults.py`; NUMBER - is any. RANK - is every rank.
"""

import errno
import os
import signal
import sys
from typing import Any

from harness.__main__ import main
from harness.record import record_file
from harness.runtime import faults

kind, point, number, rank = sys.argv[1:5]


def record() -> dict[str, Any]:
    """The run's record as it is on disk."""
    (directory,) = [word.partition("=")[2] for word in sys.argv if word.startswith("hydra.run.dir=")]
    return record_file.read(directory)


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
    if kind == "noted":
        while record()["failure"]["where"] != {"step": passed_number, "phase": passed, "micro_batch": 0}:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    if kind.startswith("term"):
        os.kill(os.getpid(), signal.SIGTERM)
    while kind.endswith("hang"):
        pass
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    if kind == "denied":
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), point)
    if kind == "raise":
        raise ValueError("out of luck")


faults.inject = fail
sys.argv[1:] = sys.argv[5:]
raise SystemExit(main(sys.argv[1:]))
