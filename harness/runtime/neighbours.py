"""What the ranks of one host know of each other, before they have met too: a file of each in torchrun's directory.

It has the rank's process and the place where it is. On request its process writes beside it where its Python stands.
"""

import faulthandler
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from harness.config.refusal import Refusal
from harness.runtime import launcher

FILE, STACK = "rank.json", "stack.txt"

WIDTH = 256
"""Bytes of a rank's file: it is always overwritten as a whole."""

ASK = signal.SIGURG
"""The signal that asks for a stack. A process that does not expect it ignores it."""

ANSWER = 2.0
"""The most seconds to wait for a stack."""

WAITING = ("/torch/distributed/", "/harness/runtime/world.py", "/harness/runtime/failure.py")
"""Where Python stands in a rank that waits for other ranks, or that has ended to wait."""

Place = tuple[int, str, int]
"""Step, phase and micro-batch, as in the ledger's `Where`."""


@dataclass(frozen=True)
class Neighbour:
    """A rank of this host. `place` is None before its first phase; `left`: it has ended in order."""

    rank: int
    pid: int
    place: Place | None = None
    left: bool = False

    @property
    def gone(self) -> bool:
        """Whether its process has ended, and not in order."""
        return not self.left and not alive(self.pid)


class Own:
    """The file of this rank."""

    def __init__(self, directory: Path, rank: int, local_rank: int) -> None:
        self.entry: dict[str, object] = {"rank": rank, "pid": os.getpid(), "place": None, "left": False}
        self.file = os.open(directory / str(local_rank) / FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._write()

    def at(self, step: int, phase: str, micro_batch: int) -> None:
        """This rank is there now. It costs two microseconds, and outlives the process."""
        self._write(place=(step, phase, micro_batch))

    def leave(self) -> None:
        """This rank ends in order: nobody will blame it."""
        self._write(left=True)

    def close(self) -> None:
        """Nothing more is said of this rank."""
        os.close(self.file)
        self.file = -1

    def _write(self, **news: object) -> None:
        self.entry.update(news)
        with suppress(OSError):  # a full disk ends no run here
            os.pwrite(self.file, json.dumps(self.entry).ljust(WIDTH).encode(), 0)


@contextmanager
def known(real: bool = True) -> Iterator[Callable[[int, str, int], object]]:
    """In this context the neighbours know this rank; yields what tells them its place.

    It leaves it in order, unless with an error other than a refusal. Without torchrun, and if the run is not `real`, it
    has no neighbours.
    """
    directory = launcher.directory() if real else None
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    if directory is None:
        yield lambda step, phase, micro_batch: None
        return
    own = Own(directory, rank, local_rank)
    with (directory / str(local_rank) / STACK).open("w") as stack:
        faulthandler.register(ASK, file=stack, all_threads=False)
        try:
            yield own.at
        except Refusal:
            own.leave()
            raise
        else:
            own.leave()
        finally:
            faulthandler.unregister(ASK)
            own.close()


def of_this_host(directory: Path | None) -> list[Neighbour]:
    """The ranks of this host that have said so, this one too, by rank."""
    listed = []
    for local_rank in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if directory else 0):
        assert directory is not None
        with suppress(OSError, ValueError):  # it has not come yet, or writes just now
            entry = json.loads((directory / str(local_rank) / FILE).read_bytes())
            listed.append(Neighbour(entry["rank"], entry["pid"], entry["place"], entry["left"]))
    return listed


def stack_of(neighbour: Neighbour, directory: Path) -> list[str]:
    """The frames of its main thread, innermost first, as `FILE line N in FUNCTION`. Empty: it does not answer."""
    for file in directory.glob(f"*/{FILE}"):
        with suppress(OSError, ValueError):
            if json.loads(file.read_bytes())["pid"] == neighbour.pid:
                return _asked(neighbour.pid, file.with_name(STACK))
    return []


def _asked(pid: int, file: Path) -> list[str]:
    before, text = file.stat().st_size, ""
    os.kill(pid, ASK)
    deadline = time.monotonic() + ANSWER
    while time.monotonic() < deadline:
        time.sleep(0.05)
        newer = file.read_bytes()[before:].decode(errors="replace")
        if newer and newer == text:
            break
        text = newer
    return [f"{file} line {line} in {function}" for file, line, function in re.findall(_FRAME, text)]


_FRAME = r'File "([^"]*)", line (\d+) in (.*)'


def waits(frames: Sequence[str]) -> bool:
    """Whether a rank whose Python stands at `frames` waits for other ranks."""
    return any(part in frame for frame in frames for part in WAITING)


def stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal or a debugger."""
    return _state(pid) in ("T", "t")


def alive(pid: int) -> bool:
    """Whether the process runs, or waits or is stopped."""
    if state := _state(pid):
        return state not in "ZX"
    return not Path("/proc/self").exists() and _accepts_signals(pid)


def _state(pid: int) -> str:
    """The letter of the process's state in Linux. Empty: it is not there, or this is another system."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _accepts_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
