"""Failures of a run: the rank that failed first is reported, and the others end within seconds."""

import json
import os
import signal
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from harness.config.errors import one_line
from harness.ledger import Where
from harness.runtime import faults, launcher, neighbours, tracebacks
from harness.runtime.files import put
from harness.runtime.memory_limit import NotFree, Shortage, shortage
from harness.runtime.neighbours import Neighbour, alive
from harness.runtime.world import World

PATIENCE = 3.0
"""Seconds that a rank which only lost a peer waits for the failed rank's report."""

CLAIM = "failure.json"

_TIMED_OUT = ("timed out waiting", "application timeout", "wait timeout after", "timed out after")
"""Those of a rank that has waited for `world.timeout` seconds."""

_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "nccl communicator was aborted",
    "remote process exited",
    "broken connection",
    "connection was closed",
    *_TIMED_OUT,
)
"""Messages of process groups on a rank whose peer has ended, or does not answer. Such an error is not the cause."""


@dataclass(frozen=True)
class Failure:
    """The failed rank, where it failed, and the error. None: one of several ranks that this host cannot tell apart; or,
    if the run was ended from `outside`, none.
    """

    rank: int | None
    where: Where | None
    error: str
    stage: int | None = None  # pipeline stage
    shortage: Shortage | None = None  # of memory
    outside: bool = False
    hanging: int | None = None  # its process on this host, which does not end by itself

    def sentence(self) -> str:
        """The failure in one line."""
        where = self.where if self.where and self.where.phase != "idle" else None
        place = f" in step {where.step}, {where.phase} of micro-batch {where.micro_batch}" if where else ""
        if self.outside:
            return f"the run stopped{place}: {self.error}"
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
    """This rank's failure, or the peer's if `error` only says that a peer has ended or does not answer.

    None: that peer has reported its failure itself.
    """
    if _says(error, _LOST_PEER):
        failure = peer_lost(directory, world, timed_out=_says(error, _TIMED_OUT))
        if failure is not None or _claimed(directory):
            return failure
        if elsewhere := [
            rank for rank, (host, _) in enumerate(world.members) if host != socket.gethostname()
        ]:
            return _lost_host(error, elsewhere, world)
    return replace(_with_traceback(error, world.rank, where, directory), stage=_stage(world, world.rank))


def early(error: BaseException, directory: Path, world: World) -> Failure | None:
    """As `of`, before the run has a directory: torchrun's `directory` has reports, and tracebacks go to stderr."""
    if _says(error, _LOST_PEER):
        failure = peer_lost(directory, world, timed_out=_says(error, _TIMED_OUT))
        if failure is not None or _claimed(directory):
            return failure
    elif not isinstance(error, OSError):
        traceback.print_exception(error)
    return Failure(world.rank, None, error_line(error))


def peer_failed(directory: Path, world: World) -> bool:
    """Whether a rank has reported the run's end, or one of this host has ended."""
    return _claimed(directory) or gone(world) is not None


def outside(error: str, where: Where | None, directory: Path, world: World) -> Failure | None:
    """The end of the run by something outside it, which all ranks notice. None: another rank has reported the end.

    If a rank of this host has ended, its failure: torchrun then ends the others as it ends all.
    """
    here = all(host == socket.gethostname() for host, _ in world.members)
    if failure := peer_lost(directory, world, patience=0 if here else PATIENCE):
        return failure
    if not world.leads:
        await_report(directory)  # rank 0 notices the same, and its record has more
    return None if _claimed(directory) else Failure(None, where, error, outside=True)


def _says(error: BaseException, messages: tuple[str, ...]) -> bool:
    return any(message in str(error).lower() for message in messages)


def _lost_host(error: BaseException, elsewhere: list[int], world: World) -> Failure:
    """The failure if all ranks of this host live and no rank `elsewhere` has reported: a whole host may have ended."""
    silence = "it did not answer" if _says(error, _TIMED_OUT) else "it ended without an error message"
    rank = elsewhere[0] if len(elsewhere) == 1 else None
    hosts = ", ".join(sorted({world.members[member][0] for member in elsewhere}))
    description = f"{silence}; its host or link may be down ({hosts}): {error_line(error)}"
    return Failure(rank, None, description, None if rank is None else _stage(world, rank))


def of_rehearsal(error: Exception, directory: Path) -> Failure:
    """A rehearsal's failure, with the rehearsed rank and where it failed, if `error` has them."""
    rank, where = getattr(error, "rehearsed", (0, None))
    return _with_traceback(error, rank, where, directory)


def _with_traceback(error: BaseException, rank: int, where: Where | None, directory: Path) -> Failure:
    file = _details(directory, rank)
    try:
        put(file, "".join(traceback.format_exception(error)).encode(errors="backslashreplace"))
    except OSError:  # a full disk must not hide the failure
        if not isinstance(error, OSError):
            return Failure(rank, where, tracebacks.sentence(error), shortage=shortage(error))
    return Failure(rank, where, error_line(error), shortage=shortage(error))


def _details(directory: Path, rank: int) -> Path:
    """The file with the traceback of `rank`."""
    return directory / f"failure-rank{rank}.txt"


def error_line(error: BaseException) -> str:
    """The error in one line, with its class."""
    if missing := shortage(error):
        return missing.sentence() if not isinstance(error, NotFree) else f"out of memory: {error}"
    return one_line(error)


def peer_lost(
    directory: Path, world: World, *, timed_out: bool = False, patience: float = PATIENCE
) -> Failure | None:
    """The rank on this host whose process ended without a report. None if a rank has reported, or if all live.

    If this rank has `timed_out`, also the rank on this host for which it waited. It looks at least once, and for
    `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while not _claimed(directory):
        if failure := gone(world) or (_hanging(directory, world) if timed_out else None):
            return failure
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
        timed_out = False
    return None


def gone(world: World) -> Failure | None:
    """The first rank on this host whose process has ended, and not in order. None: there is none."""
    for each in of_this_host(world):
        if each.gone:
            description = f"its process {each.pid} ended without an error message; was it killed?"
            return _failure_of(each, world, description)
    return None


def of_this_host(world: World) -> list[Neighbour]:
    """The ranks of this host with what is known of each, in order."""
    listed = neighbours.of_this_host(launcher.directory())
    if not world.members:
        return listed
    known = {each.pid: each for each in listed}
    local = [(rank, pid) for rank, (host, pid) in enumerate(world.members) if host == socket.gethostname()]
    return [known.get(pid, Neighbour(rank, pid)) for rank, pid in local]


def _failure_of(neighbour: Neighbour, world: World, description: str) -> Failure:
    place = neighbour.place and Where(*neighbour.place)
    return Failure(neighbour.rank, place, description, _stage(world, neighbour.rank))


def _hanging(directory: Path, world: World) -> Failure | None:
    """The rank on this host for which others wait: it is stopped, or its Python stands somewhere else than theirs."""
    others = [each for each in of_this_host(world) if each.pid != os.getpid() and not each.left]
    waited = f"rank {world.rank} waited {world.timeout:g} s for it"
    for each in others:
        if neighbours.stopped(each.pid):
            description = f"its process {each.pid} is stopped, by a signal or a debugger; {waited}"
            return replace(_failure_of(each, world, description), hanging=each.pid)
    if (talk := launcher.directory()) is None:
        return None
    for each in others:
        frames = neighbours.stack_of(each, talk)
        if not neighbours.waits(frames):
            stands = f"hangs at {frames[0]}" if frames else f"does not answer (process {each.pid})"
            with suppress(OSError):
                put(_details(directory, each.rank), "".join(f"{frame}\n" for frame in frames))
            return replace(
                _failure_of(each, world, f"it {stands}; {waited} (world.timeout)"), hanging=each.pid
            )
    return None


def _stage(world: World, rank: int) -> int | None:
    return world.layout.stage(rank) if world.stages > 1 else None


def claim(directory: Path, report: Report) -> bool:
    """Whether `report` is the first report of the run's end. Only the first report is printed and recorded.

    It also is the first where nothing can be written: better two reports than none.
    """
    for place in reversed(_places(directory)):
        try:
            faults.at(f"write {CLAIM}" if place == directory else "meet")
            with (place / CLAIM).open("x") as stream:
                stream.write(json.dumps(asdict(report)) + "\n")
        except FileExistsError:
            return False
        except OSError:
            pass
    return True


def _places(directory: Path) -> list[Path]:
    """Where ranks look for a report: in the run's `directory`, and in torchrun's. The ranks of this host meet in that
    one before they know the run's directory, and where that takes no file.
    """
    shared = launcher.directory()
    return [directory] if shared in (None, directory) else [directory, shared]


def _claimed(directory: Path) -> bool:
    return any((place / CLAIM).exists() for place in _places(directory))


def first_report(directory: Path) -> Report | None:
    """The first report of the run's end. None if there is none, or if the run's directory was removed.

    One that is never complete is of a rank that failed on a full disk, and says so.
    """
    deadline = time.monotonic() + PATIENCE
    while _claimed(directory) and time.monotonic() < deadline:
        for place in _places(directory):
            with suppress(OSError, ValueError):  # not there, or not completely written yet
                return Report(**json.loads((place / CLAIM).read_text()))
        time.sleep(0.05)
    if not _claimed(directory):
        return None
    return Report(None, f"a rank failed, and could not write why to {directory / CLAIM}", 3)


def await_report(directory: Path) -> None:
    """Wait, for a limited time, until another rank has reported the run's end."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and directory.exists() and not _claimed(directory):
        time.sleep(0.05)


def end_others(world: World) -> bool:
    """End the other ranks of this host, as torchrun does, and wait. Returns whether all other ranks have ended."""
    deadline = time.monotonic() + PATIENCE
    local_pids = [pid for host, pid in world.members if host == socket.gethostname() and pid != os.getpid()]
    for pid in local_pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while time.monotonic() < deadline and any(map(alive, local_pids)):
        time.sleep(0.05)
    return len(local_pids) + 1 == world.size and not any(map(alive, local_pids))
