"""What a program keeps in the host's memory in place of the device's: no category of the device counts it."""

import weakref
from collections import Counter
from dataclasses import dataclass

import torch

from harness.ledger.events import Where
from harness.ledger.in_flight import Forwards
from harness.ledger.log import Log


@dataclass(frozen=True)
class MostOnHost:
    """The most bytes at once, and where that was. `forwards` are the most that waited there for their backward.

    `pinned` is what CUDA's allocator of pinned memory reserves for them. It rounds each tensor to a power of two, and
    keeps a block for the next one of that size (ATen/core/CachingHostAllocator.h, at its default settings). A block
    that a copy still reads is not free yet, so it may reserve more. None: no memory is pinned.
    """

    bytes: int
    where: Where
    forwards: Forwards
    pinned: int | None = None


class OnHost:
    """Counts tensors in the host's memory, by the phase of `log` that puts them there. It keeps none alive."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._bytes: Counter[Where] = Counter()  # that are there now
        self._most: tuple[int, Where] | None = None
        self._forwards = Forwards()
        self._blocks: Counter[int] = Counter()  # pinned and in use, by size
        self._reserved: Counter[int] = Counter()

    def add(self, tensor: torch.Tensor, pinned: bool) -> None:
        """Count `tensor`, which owns its storage, for as long as that lives. `pinned`: it is in pinned memory."""
        storage, where = tensor.untyped_storage(), self._log.where
        nbytes = storage.nbytes()
        block = 1 << (nbytes - 1).bit_length() if pinned else 0
        self._bytes[where] += nbytes
        self._blocks[block] += 1
        self._reserved[block] = max(self._reserved[block], self._blocks[block])
        total = self._bytes.total()
        if self._most is None or total > self._most[0]:
            self._most = total, where
        if (len(self._bytes), total) > (self._forwards.alive, sum(self._forwards.saved_bytes)):
            self._forwards = Forwards(len(self._bytes), tuple(self._bytes.values()), where)
        weakref.finalize(storage, self._freed, where, nbytes, block).atexit = False

    def _freed(self, where: Where, nbytes: int, block: int) -> None:
        self._blocks[block] -= 1
        self._bytes[where] -= nbytes
        if not self._bytes[where]:
            del self._bytes[where]

    @property
    def bytes(self) -> int:
        """The bytes that are there now."""
        return self._bytes.total()

    @property
    def most(self) -> MostOnHost | None:
        """The most at once. None: nothing was there."""
        if self._most is None:
            return None
        pinned = sum(size * number for size, number in self._reserved.items())
        return MostOnHost(*self._most, self._forwards, pinned or None)
