"""Failures of a run: the rank that failed first is reported, and the others end within seconds."""

import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from harness.ledger import Where
from harness.runtime import faults, tracebacks
from harness.runtime.files import put
from harness.runtime.memory_limit import NotFree, Shortage, shortage
from harness.runtime.world import World

PATIENCE = 3.0
"""Seconds that a rank which only lost a peer waits for the failed rank's report."""

CLAIM = "failure.json"

_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "application timeout",
    "nccl communicator was aborted",
    "remote process exited",
)
"""Messages of process groups on a rank whose peer has ended. Such an error is not the cause."""


@dataclass(frozen=True)
class Failure:
    """The failed rank, where it failed, and the error. None: one of several ranks that this host cannot tell apart."""

    rank: int | None
    where: Where | None
    error: str
    stage: int | None = None  # pipeline stage
    shortage: Shortage | None = None  # of memory

    def sentence(self) -> str:
        """The failure in one line."""
        where = self.where
        place = f" in step {where.step}, {where.phase} of micro-batch {where.micro_batch}" if where else ""
        stage = "" if self.stage is None else f", stage {self.stage},"
        rank = "a rank on another host" if self.rank is None else f"rank {self.rank}"
        return f"{rank}{stage} failed{place}: {self.error}"


@dataclass(frozen=True)
class Report:
    """The report of the first rank to end, for all ranks, and the exit code of all."""

    rank: int | None
    sentence: str
    code: int


def of(error: BaseException, where: Where, directory: Path, world: World) -> Failure | None:
    """This rank's failure, or the peer's if `error` only says that a peer has ended.

    None: that peer has reported its failure itself.
    """
    if any(message in str(error).lower() for message in _LOST_PEER):
        failure = peer_lost(directory, world)
        if failure is not None or (directory / CLAIM).exists():
            return failure
        if elsewhere := [
            rank for rank, (host, _) in enumerate(world.members) if host != socket.gethostname()
        ]:
            return _lost_host(error, elsewhere, world)
    return replace(_with_traceback(error, world.rank, where, directory), stage=_stage(world, world.rank))


def _lost_host(error: BaseException, elsewhere: list[int], world: World) -> Failure:
    """The failure if all ranks of this host live and no rank `elsewhere` has reported: a whole host may have ended."""
    rank = elsewhere[0] if len(elsewhere) == 1 else None
    hosts = ", ".join(sorted({world.members[member][0] for member in elsewhere}))
    description = (
        f"it ended without an error message; its host or link may be down ({hosts}): {_error_line(error)}"
    )
    return Failure(rank, None, description, None if rank is None else _stage(world, rank))


def of_rehearsal(error: Exception, directory: Path) -> Failure:
    """A rehearsal's failure, with the rehearsed rank and where it failed, if `error` has them."""
    rank, where = getattr(error, "rehearsed", (0, None))
    return _with_traceback(error, rank, where, directory)


def _with_traceback(error: BaseException, rank: int, where: Where | None, directory: Path) -> Failure:
    file = directory / f"failure-rank{rank}.txt"
    try:
        put(file, "".join(traceback.format_exception(error)).encode(errors="backslashreplace"))
    except OSError:  # a full disk must not hide the failure
        if not isinstance(error, OSError):
            return Failure(rank, where, tracebacks.sentence(error), shortage=shortage(error))
    return Failure(rank, where, _error_line(error), shortage=shortage(error))


def _error_line(error: BaseException) -> str:
    if missing := shortage(error):
        return missing.sentence() if not isinstance(error, NotFree) else f"out of memory: {error}"
    message = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def peer_lost(directory: Path, world: World) -> Failure | None:
    """The rank on this host whose process ended without a report. None if a rank has reported, or if all live."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not (directory / CLAIM).exists():
        for rank, (host, pid) in enumerate(world.members):
            if host == socket.gethostname() and not _alive(pid):
                description = f"its process {pid} ended without an error message; was it killed?"
                return Failure(rank, None, description, _stage(world, rank))
        time.sleep(0.05)
    return None


def _stage(world: World, rank: int) -> int | None:
    return world.layout.stage(rank) if world.stages > 1 else None


def claim(directory: Path, report: Report) -> bool:
    """Whether `report` is the first report of the run's end. Only the first report is printed and recorded."""
    try:
        faults.at(f"write {CLAIM}")
        with (directory / CLAIM).open("x") as stream:
            stream.write(json.dumps(asdict(report)) + "\n")
    except (FileExistsError, FileNotFoundError):  # a refused run removes its directory
        return False
    except OSError:
        pass  # no rank can write there: report twice rather than never
    return True


def first_report(directory: Path) -> Report | None:
    """The first report of the run's end. None if there is none, or if the run's directory was removed.

    One that is never complete is of a rank that failed on a full disk, and says so.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            return Report(**json.loads((directory / CLAIM).read_text()))
        except OSError:
            return None
        except ValueError:  # not completely written yet
            time.sleep(0.05)
    return Report(None, f"a rank failed, and could not write why to {directory / CLAIM}", 3)


def await_report(directory: Path) -> None:
    """Wait, for a limited time, until another rank has reported the run's end."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and directory.exists() and not (directory / CLAIM).exists():
        time.sleep(0.05)


def end_others(world: World) -> bool:
    """End the other ranks of this host, as torchrun does, and wait. Returns whether all other ranks have ended."""
    deadline = time.monotonic() + PATIENCE
    local_pids = [pid for host, pid in world.members if host == socket.gethostname() and pid != os.getpid()]
    for pid in local_pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while time.monotonic() < deadline and any(map(_alive, local_pids)):
        time.sleep(0.05)
    return len(local_pids) + 1 == world.size and not any(map(_alive, local_pids))


def await_termination(last: Callable[[], object]) -> None:
    """Call `last` when the launcher ends this process, also while its main thread waits in a collective.

    torchrun sends SIGTERM to the others as soon as one rank has ended.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    # the main thread may never run a Python handler; the pipe is enough
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while signal.SIGTERM not in os.read(read_end, 1):
            pass
        last()

    threading.Thread(target=wait, name="await-termination", daemon=True).start()


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    except FileNotFoundError:
        return not Path("/proc/self").exists() and _accepts_signals(pid)
    except OSError:
        return _accepts_signals(pid)


def _accepts_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
