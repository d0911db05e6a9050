"""Requests drawn by seed: 1,000 of them, or as many as are asked for; each must be rehearsed or refused by a sentence.

python -m tests.benchmarks.fuzzed [COUNT [FIRST [WHOLE]]]

Every WHOLE-th goes through Hydra, the others into a config that it has composed before.
"""

import sys
import time
import traceback
from collections import Counter
from random import Random

from tests.fuzzed import Hang, refused, request

SLOW = 5.0


def main(count: int, first: int = 0, whole: int = 1) -> None:
    """Print each request that ends in another way, or late."""
    ends = Counter[str]()
    for number in range(first, first + count):
        words = request(Random(number))
        start = time.process_time()
        try:
            sentence = refused(words, whole=number % whole == 0)
            ends["refused" if sentence else "done"] += 1
            if sentence and (not sentence.isprintable() or len(sentence) > 700):
                print(f"{number}: {words[5:]}: {sentence[:300]!r}", flush=True)
        except (Exception, Hang) as error:
            ends[type(error).__name__] += 1
            place = [
                each for each in traceback.extract_tb(error.__traceback__) if "/harness/" in each.filename
            ][-1]
            where = f"{place.filename.partition('/harness/')[2]}:{place.lineno}"
            print(f"{number}: {words}: {type(error).__name__}: {str(error)[:200]!r} {where}", flush=True)
        if (seconds := time.process_time() - start) > SLOW:
            print(f"{number}: {words}: {seconds:.0f} s", flush=True)
    print(dict(ends), f"{time.process_time():.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ["1000"]))
