"""How a run fails: the rank that failed first is the one named, and the others go within seconds."""

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
from typing import Any

from harness.ledger import Where
from harness.runtime.world import World

PATIENCE = 3.0
"""Seconds that a rank which only lost its peers waits for the one that failed to say so."""

UNFINISHED = {"rank": None, "where": None, "error": "the run ended before it could say why"}
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
"""What the process groups say on a rank whose peer is gone; its own error is not the cause."""


@dataclass(frozen=True)
class Failure:
    """Which rank failed, where in its run, and with what. None: one of several that this host cannot tell apart."""

    rank: int | None
    where: Where | None
    error: str
    stage: int | None = None  # of a pipeline

    def as_record(self) -> dict[str, Any]:
        """As `record.json` has it."""
        where = self.where._asdict() if self.where else None
        return {"rank": self.rank, "stage": self.stage, "where": where, "error": self.error}

    def sentence(self) -> str:
        """One line for a person."""
        where = self.where
        place = f" in step {where.step}, {where.phase} of micro-batch {where.micro_batch}" if where else ""
        stage = "" if self.stage is None else f", stage {self.stage},"
        rank = "a rank on another host" if self.rank is None else f"rank {self.rank}"
        return f"{rank}{stage} failed{place}: {self.error}"


@dataclass(frozen=True)
class Word:
    """What the first rank to end says for all of them, and the exit code that they end with."""

    rank: int | None
    sentence: str
    code: int


def of(error: BaseException, where: Where, directory: Path, world: World) -> Failure | None:
    """This rank's failure; or, where `error` only says that a peer is gone, that peer's. None: it has told itself."""
    if any(words in str(error).lower() for words in _LOST_PEER):
        found = peer_lost(directory, world)
        if found is not None or (directory / CLAIM).exists():
            return found
        if elsewhere := [
            rank for rank, (host, _) in enumerate(world.members) if host != socket.gethostname()
        ]:
            return _lost(error, elsewhere, world)
    return replace(_told(error, world.rank, where, directory), stage=_stage(world, world.rank))


def _lost(error: BaseException, elsewhere: list[int], world: World) -> Failure:
    """What is known where this host's ranks live and none `elsewhere` has told: a whole host may be gone."""
    rank = elsewhere[0] if len(elsewhere) == 1 else None
    hosts = ", ".join(sorted({world.members[each][0] for each in elsewhere}))
    gone = f"it was lost without a word, with its host or its link ({hosts}): {_line(error)}"
    return Failure(rank, None, gone, None if rank is None else _stage(world, rank))


def of_rehearsal(error: Exception, directory: Path) -> Failure:
    """A rehearsal's failure: of the rank that was rehearsed and the place in its run, as far as `error` notes them."""
    rank, where = getattr(error, "rehearsed", (0, None))
    return _told(error, rank, where, directory)


def _told(error: BaseException, rank: int, where: Where | None, directory: Path) -> Failure:
    with (directory / f"failure-rank{rank}.txt").open("w", encoding="utf-8") as stream:
        traceback.print_exception(error, file=stream)
    return Failure(rank, where, _line(error))


def _line(error: BaseException) -> str:
    told = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def peer_lost(directory: Path, world: World) -> Failure | None:
    """The rank on this host that is gone without a word. None where a rank has told, or none is found."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not (directory / CLAIM).exists():
        for rank, (host, pid) in enumerate(world.members):
            if host == socket.gethostname() and not _alive(pid):
                gone = f"its process {pid} is gone without a word; was it killed?"
                return Failure(rank, None, gone, _stage(world, rank))
        time.sleep(0.05)
    return None


def _stage(world: World, rank: int) -> int | None:
    return rank // world.replicas if world.stages > 1 else None


def claim(directory: Path, word: Word) -> bool:
    """Whether `word` is the first that a rank has about the end; only that one is said, and has a record."""
    try:
        with (directory / CLAIM).open("x") as stream:
            stream.write(json.dumps(asdict(word)) + "\n")
    except (
        FileExistsError,
        FileNotFoundError,
    ):  # or all is removed already, for a refused run leaves nothing
        return False
    except OSError:
        pass  # nobody can write there, and better twice than never
    return True


def first_word(directory: Path) -> Word | None:
    """What the first rank has said about the end; None where nobody has, or where nothing is left of the run."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            return Word(**json.loads((directory / CLAIM).read_text()))
        except OSError:
            return None
        except ValueError:  # it is being written
            time.sleep(0.05)
    return None


def await_word(directory: Path) -> None:
    """Wait a while for another rank to say what became of the run."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and directory.exists() and not (directory / CLAIM).exists():
        time.sleep(0.05)


def end_others(world: World) -> bool:
    """End the other ranks of this host, as torchrun would, and wait a while; whether all of the world's are gone."""
    deadline = time.monotonic() + PATIENCE
    here = [pid for host, pid in world.members if host == socket.gethostname() and pid != os.getpid()]
    for pid in here:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while time.monotonic() < deadline and any(map(_alive, here)):
        time.sleep(0.05)
    return len(here) + 1 == world.size and not any(map(_alive, here))


def await_termination(last: Callable[[], object]) -> None:
    """Call `last` when the launcher ends this process, even while its main thread waits in a collective.

    torchrun sends SIGTERM to the others as soon as one rank is gone.
    """
    heard, rung = os.pipe()
    os.set_blocking(rung, False)
    signal.set_wakeup_fd(rung, warn_on_full_buffer=False)
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # the main thread may never come to run it; the pipe is enough

    def wait() -> None:
        while signal.SIGTERM not in os.read(heard, 1):
            pass
        last()

    threading.Thread(target=wait, name="await-termination", daemon=True).start()


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    except FileNotFoundError:
        return not Path("/proc/self").exists() and _signalled(pid)
    except OSError:
        return _signalled(pid)


def _signalled(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
