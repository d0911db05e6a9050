"""How long `harness fit` takes to its first answer, and to the end. Asserts nothing.

    python tests/benchmarks/fit.py [rounds=3] [cores=2]
    python tests/benchmarks/fit.py [rounds=3] vs=DIR    beside another checkout, in turn; only ends are compared

Every measurement is the whole command in a fresh process, on so many cores. Rounds go through all searches in turn;
medians are printed with the lowest and highest, in seconds by the clock.
"""

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SEARCHES = {
    "train llama2-7b on 8": "mode=train model=llama2-7b world.size=8 hardware=h100-sxm train.sequence=4096",
    "train llama3-405b on 8": "mode=train model=llama3-405b world.size=8 hardware=h100-sxm",
    "generate llama3-8b on 1": "mode=infer model=llama3-8b world.size=1 hardware=rtx4090 "
    "generation.prompt_length=512,2048",
}
REHEARSED = re.compile(r"^(\d+) configs rehearsed")


class Taken(NamedTuple):
    """Seconds to the first answer and to the end, and how many configs were rehearsed; None where not printed."""

    first: float | None
    end: float
    rehearsed: int | None


def main(requested: list[str]) -> None:
    given = dict(word.partition("=")[::2] for word in requested)
    rounds, cores = int(given.get("rounds", "3")), int(given.get("cores", "2"))
    roots = [ROOT, *([Path(given["vs"]).expanduser().resolve()] if "vs" in given else [])]
    taken: dict[tuple[str, Path], list[Taken]] = {}
    for _ in range(rounds):
        for name, words in SEARCHES.items():
            for root in roots:
                taken.setdefault((name, root), []).append(measured(words, root, cores))
    tell_machine(cores)
    print(
        f"{'search':<26}{'first answer':>24}{'end':>24}{'rehearsed':>11}"
        + f"{'ratio of ends':>24}" * len(roots[1:])
    )
    for name in SEARCHES:
        mine = taken[name, ROOT]
        line = (
            f"{name:<26}{spread([each.first for each in mine]):>24}{spread([each.end for each in mine]):>24}"
        )
        line += f"{mine[0].rehearsed or '-':>11}"
        for root in roots[1:]:
            ratios = [here.end / there.end for here, there in zip(mine, taken[name, root], strict=True)]
            line += f"{spread(ratios, 2):>24}"
        print(line)


def measured(words: str, root: Path, cores: int) -> Taken:
    """One search with the code of the checkout `root`."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "fit", *words.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]),
    )
    first = rehearsed = None
    assert process.stdout
    for line in process.stdout:
        if line.startswith("first answer") and "nothing fits" not in line:
            first = first or time.perf_counter() - began
        if match := REHEARSED.match(line):
            rehearsed = int(match[1])
    process.wait()
    return Taken(first, time.perf_counter() - began, rehearsed)


def spread(values: list[float | None] | list[float], digits: int = 0) -> str:
    """The median, and the lowest and highest."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle, lowest, highest = statistics.median(known), min(known), max(known)
    return f"{middle:.{digits}f} ({lowest:.{digits}f} to {highest:.{digits}f})"


def tell_machine(cores: int) -> None:
    """The command, the machine, and the packages."""
    from harness.record import record_file

    machine = record_file.environment()
    print(f"$ python tests/benchmarks/fit.py {' '.join(sys.argv[1:])}".rstrip())
    busy = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{machine.processor}, {cores} of {os.cpu_count()} cores; load {busy}")
    print(f"python {platform.python_version()}, {machine.packages}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
