"""Training that is killed again and again under `launch/supervised`: is it the undisturbed run? Asserts nothing.

    python tests/benchmarks/soak.py [minutes=20] [every=60]

Two ranks train for about so many minutes, undisturbed; then again, while every so many seconds a rank, or torchrun
itself, is killed, or every rank is asked to end. Printed are whether the last weights are equal, and what there is of
files, processes, ports and memory after the first minute and at the end.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    *("hardware=cpu", "precision=fp32", "mode=train", "model=tiny", "zero=2", "seed=1"),
    *("train.sequence=128", "train.micro_batch=4", "train.validate_every=50", "hardware.bandwidth=1e10"),
)
LAUNCHER = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "harness",
)
MARK = "HARNESS_SOAK"
"""The variable by which the processes of this soak are known."""


class Left(NamedTuple):
    """What there is at one moment. Bytes are those of all processes that belong to the soak."""

    partial_files: int
    temporary_files: int
    processes: int
    ports: int
    bytes: int


def main(requested: list[str]) -> None:
    given = dict(word.partition("=")[::2] for word in requested)
    minutes, every = float(given.get("minutes", "20")), float(given.get("every", "60"))
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    around = {
        **os.environ,
        MARK: str(os.getpid()),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(home),
        "RANKS": "2",
    }
    around["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{around['PATH']}"
    steps = steps_in(minutes, home, around)
    words = (
        *WORDS,
        f"train.steps={steps}",
        f"train.save_every={max(1, round(steps * every / minutes / 300))}",
    )
    began = time.monotonic()
    run([*LAUNCHER, *words, f"hydra.run.dir={home}/undisturbed"], around)
    undisturbed = time.monotonic() - began
    began = time.monotonic()
    code, faults, first, last = disturbed(home, words, every, around)
    print(f"$ python tests/benchmarks/soak.py {' '.join(requested)}".rstrip())
    taken = f"{undisturbed:,.0f} s undisturbed, {time.monotonic() - began:,.0f} s with {len(faults)} faults"
    print(f"{steps:,} steps: {taken}")
    print(f"faults: {', '.join(faults)}")
    starts = sorted((home / "supervised").iterdir(), key=lambda path: int(path.name))
    weights = [digest(path / "checkpoint") for path in (home / "undisturbed", starts[-1])]
    print(
        f"exit code {code} after {len(starts)} starts; last weights equal: {'yes' if len({*weights}) == 1 else 'NO'}"
    )
    print(f"{'':<26}{'after the first fault':>24}{'at the end':>14}")
    for name in Left._fields:
        print(f"{name.replace('_', ' '):<26}{getattr(first, name):>24,}{getattr(last, name):>14,}")
    shutil.rmtree(home)


def steps_in(minutes: float, home: Path, around: dict[str, str]) -> int:
    """How many steps take so long, by a short run."""
    from harness.record import record_file

    run([*LAUNCHER, *WORDS, "train.steps=30", "train.export=false", f"hydra.run.dir={home}/paced"], around)
    seconds = record_file.read(home / "paced")["performance"]["step_seconds"]
    return max(30, int(60 * minutes / seconds))


def run(command: list[str], around: dict[str, str]) -> None:
    subprocess.run(command, check=True, env=around, cwd=ROOT, stdout=subprocess.DEVNULL)


def disturbed(
    home: Path, words: tuple[str, ...], every: float, around: dict[str, str]
) -> tuple[int, list[str], Left, Left]:
    """Train under the supervisor and let something fail every so many seconds.

    Its exit code, the faults, and what there was after the first one and at the end.
    """
    chosen = random.Random(0)
    faults: list[str] = []
    first = None
    supervisor = subprocess.Popen(
        [ROOT / "launch/supervised", home / "supervised", *words],
        env=around,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    while True:
        with suppress(subprocess.TimeoutExpired):
            supervisor.wait(every)
            break
        if first is None and faults:
            first = left(home)
        if fault := disturb(supervisor.pid, chosen):
            faults.append(fault)
    return supervisor.returncode, faults, first or left(home), left(home)


def disturb(supervisor: int, chosen: random.Random) -> str:
    """Let one thing fail. Returns what it was; empty where no rank is running."""
    tree = psutil.Process(supervisor).children(recursive=True)
    launchers = [each for each in tree if any(other.ppid() == each.pid for other in ranks(tree))]
    of_ranks = ranks(tree)
    if not of_ranks or not launchers:
        return ""
    fault = chosen.choice(["a rank killed", "torchrun killed", "every rank asked to end"])
    targets = {"a rank killed": [chosen.choice(of_ranks)], "torchrun killed": launchers}.get(fault, of_ranks)
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            target.send_signal(signal.SIGTERM if fault.startswith("every") else signal.SIGKILL)
    return fault


def ranks(tree: list[psutil.Process]) -> list[psutil.Process]:
    """The processes in `tree` that are ranks."""
    found = []
    for each in tree:
        with suppress(psutil.Error):
            if "RANK" in each.environ():
                found.append(each)
    return found


def left(home: Path) -> Left:
    """What there is now."""
    own = list(processes())
    ports = bytes_ = 0
    for each in own:
        with suppress(psutil.Error):
            ports += sum(link.status == psutil.CONN_LISTEN for link in each.net_connections())
            bytes_ += each.memory_info().rss
    partial = sum(1 for _ in home.rglob(".*partial*"))
    temporary = sum(1 for path in home.iterdir() if path.name not in ("supervised", "undisturbed", "paced"))
    return Left(partial, temporary, len(own), ports, bytes_)


def processes() -> Iterator[psutil.Process]:
    """Every process that this soak has started, wherever it hangs in the tree."""
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if each.pid != os.getpid() and each.environ().get(MARK) == str(os.getpid()):
                yield each


def digest(directory: Path) -> str:
    """One digest of all weights in `directory`."""
    files = sorted(directory.glob("*.safetensors"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
