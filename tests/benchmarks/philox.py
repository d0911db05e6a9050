"""The normal numbers that CUDA's generator gives for a seed, computed without CUDA.

Philox 4x32-10 (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3", 2011) as cuRAND's documentation says
it uses it, and PyTorch's grid of threads for `torch.randn`. Of use to learn which experts a benchmark's random router
chose; numbers may differ from a GPU's in the last bit.
"""

import math

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)
THREADS = 256
"""Of a block of `torch.randn`; each thread draws four numbers at a time."""


class Generator:
    """CUDA's generator after `torch.manual_seed(seed)`.

    `multiprocessors` are the GPU's, each with `resident` threads.
    """

    def __init__(self, seed: int, multiprocessors: int, resident: int = 2048) -> None:
        self.seed = seed
        self.blocks = multiprocessors * (resident // THREADS)
        self.drawn = 0

    def skip(self, count: int) -> None:
        """Leave out what `torch.randn` of `count` elements takes."""
        self.drawn += self.calls(count)

    def calls(self, count: int) -> int:
        """How often each thread draws four numbers for `count` of them."""
        return (count - 1) // (self.grid(count) * THREADS * 4) + 1

    def grid(self, count: int) -> int:
        """The blocks that work on `count` elements."""
        return min(self.blocks, -(-count // THREADS))

    def normals(self, count: int) -> NDArray[np.float32]:
        """What `torch.randn(count)` is in float32."""
        threads, calls = self.grid(count) * THREADS, self.calls(count)
        rounds = []
        for call in range(calls):
            words = philox(self.seed, self.drawn + call, np.arange(threads, dtype=np.uint64))
            rounds += [part for pair in (words[:2], words[2:]) for part in box_muller(*pair)]
        self.drawn += calls
        return np.concatenate(rounds)[:count]


def philox(seed: int, position: int, sequences: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], ...]:
    """Four words of 32 bits for each sequence, at one position in it."""
    counter = [
        np.full_like(sequences, position),
        np.zeros_like(sequences),
        sequences,
        sequences >> np.uint64(32),
    ]
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(ROUNDS):
        first, second = (
            word * np.uint64(factor) for word, factor in zip(counter[::2], MULTIPLIERS, strict=True)
        )
        counter = [
            (second >> np.uint64(32)) ^ counter[1] ^ np.uint64(keys[0]),
            second & LOW,
            (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(keys[1]),
            first & LOW,
        ]
        keys = [(key + step) & 0xFFFFFFFF for key, step in zip(keys, INCREMENTS, strict=True)]
    return tuple(counter)


def box_muller(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> tuple[NDArray[np.float32], ...]:
    """Two normal numbers of two uniform ones."""
    uniform = (first.astype(np.float64) + 0.5) / 2**32
    angle = (second.astype(np.float64) + 0.5) * (2 * math.pi / 2**32)
    radius = np.sqrt(-2 * np.log(uniform))
    return (radius * np.sin(angle)).astype(np.float32), (radius * np.cos(angle)).astype(np.float32)
