"""Every tool against records and traces that no run leaves: 1,500 of each of four files, drawn by seed.

It prints each way in which a tool ended without a sentence, what took longer than two seconds, and the most memory that
the process had. `tests/analysis/test_hostile_records.py` draws some of them at each change.

    python -m tests.benchmarks.hostile [COUNT] [FILE ...]
"""

import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests import hostile

SLOW = 2.0
"""Seconds that a tool may take."""


def main(count: int, names: list[str]) -> None:
    """Print what is wrong with `count` mutations of each of the files `names`."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        paths = hostile.rehearse(home)
        for name in names:
            start, wrong = time.process_time(), Counter[str]()
            for number in range(count):
                for command, reason, seconds in hostile.carried_out(paths, name, number):
                    if reason is None and seconds > SLOW:
                        reason = f"it took {seconds:.1f} s"
                    if reason is not None:
                        wrong[f"{command}: {reason}"] += 1
                        if wrong[f"{command}: {reason}"] == 1:
                            print(f"{name} {number}: harness {command}: {reason}", flush=True)
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            spent = time.process_time() - start
            print(f"{name}: {count} mutations, {wrong.total()} wrong, {spent:.0f} s, {most:.2f} GiB at most")


if __name__ == "__main__":
    words = sys.argv[1:]
    main(int(words[0]) if words else 1500, words[1:] or [*hostile.MUTATED, "trace"])
