"""Tools with words that none of them asks for: 1,000 commands drawn by seed, or as many as are asked for.

It prints each that ended without a sentence, or not within a minute. `tests/analysis/test_hostile_words.py` draws some
of them at each change.

    python -m tests.benchmarks.hostile_words [COUNT [FIRST]]
"""

import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from random import Random

from harness.__main__ import main as harness
from tests import hostile, hostile_words


def main(count: int, first: int = 0) -> None:
    """Print what is wrong with `count` commands."""
    with tempfile.TemporaryDirectory() as directory:
        home, start, drawn = Path(directory), time.process_time(), Counter[str]()
        paths, baseline = hostile.rehearse(home), home / "baseline.json"
        os.chdir(home)  # some commands write
        with redirect_stdout(StringIO()):
            harness(["check", str(paths["training"]), "--baseline", str(baseline), "--update"])
        for number in range(first, first + count):
            words = hostile_words.command(Random(number), home, paths, baseline)
            drawn[words[0]] += 1
            if reason := hostile_words.wrong(words):
                print(f"{number}: {[word[:80] for word in words]}: {reason}", flush=True)
        print(dict(drawn), f"{time.process_time() - start:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ["1000"]))
