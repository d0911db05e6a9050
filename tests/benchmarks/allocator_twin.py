"""How many events a second the twin of the caching allocator takes, for loads of several shapes. Asserts nothing.

python tests/benchmarks/allocator_twin.py [events=1000000]
"""

import platform
import random
import sys
import time
from collections.abc import Callable, Iterator

from harness.device.allocator_settings import parse
from harness.device.replay import Step, replay

KIB, MIB = 1024, 1024**2


def steady(events: int, draw: random.Random) -> Iterator[Step]:
    """A training step's few sizes, again and again: last in, first out."""
    sizes = [draw.choice((2 * KIB, 256 * KIB, 8 * MIB, 32 * MIB, 64 * MIB)) for _ in range(500)]
    for number in range(events // 1000):
        yield from ((number * 1000 + at, size, 0) for at, size in enumerate(sizes))
        yield from ((number * 1000 + at, -size, 0) for at, size in reversed([*enumerate(sizes)]))


def mixed(events: int, draw: random.Random, live: int, largest: int) -> Iterator[Step]:
    """Sizes that never repeat, with `live` blocks alive, freed in no order."""
    alive: list[tuple[int, int]] = []
    for key in range(events):
        if len(alive) > live or (alive and draw.random() < 0.45):
            at = draw.randrange(len(alive))
            alive[at], alive[-1] = alive[-1], alive[at]
            freed, size = alive.pop()
            yield freed, -size, 0
        else:
            size = draw.randrange(1, largest)
            alive.append((key, size))
            yield key, size, 0


def crowd(events: int, draw: random.Random) -> Iterator[Step]:
    """Every second of 20,000 distinct blocks is free, and all that follows searches among them."""
    sizes = [draw.randrange(1, 64 * KIB) * 512 + 2 * MIB for _ in range(20_000)]
    yield from ((at, size, 0) for at, size in enumerate(sizes))
    yield from ((at, -sizes[at], 0) for at in range(0, len(sizes), 2))
    for key in range(len(sizes), len(sizes) + (events - 30_000) // 2):
        size = draw.choice(sizes)
        yield key, size, 0
        yield key, -size, 0


LOADS: dict[str, Callable[[int, random.Random], Iterator[Step]]] = {
    "steady step": steady,
    "mixed, 2,000 live": lambda events, draw: mixed(events, draw, 2_000, 4 * MIB),
    "mixed, 20,000 live": lambda events, draw: mixed(events, draw, 20_000, 64 * MIB),
    "10,000 free at once": crowd,
}
SETTINGS = ("", "expandable_segments:True", "max_split_size_mb:32", "roundup_power2_divisions:4")


def main(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words)
    events = int(given.get("events", 1_000_000))
    print(f"{platform.processor() or platform.machine()}, python {platform.python_version()}")
    print(f"{'load':<22}{'settings':<28}{'events':>10}{'seconds':>9}{'events/s':>11}{'GiB reserved':>14}")
    for name, load in LOADS.items():
        steps = [*load(events, random.Random(0))]
        for settings in SETTINGS:
            began = time.perf_counter()
            result = replay(steps, parse(settings))
            seconds = time.perf_counter() - began
            print(
                f"{name:<22}{settings or 'default':<28}{len(steps):>10,}{seconds:>9.2f}"
                f"{len(steps) / seconds:>11,.0f}{result.most_reserved.reserved / 1024**3:>14.1f}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
