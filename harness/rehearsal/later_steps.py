"""What a GPU's allocator does in the steps of training after those that were rehearsed: each repeats the last.

A step may be out of memory though it allocates no more than the one before. Where memory is nearly full, the allocator
empties its cache, and what it reserves next lies in another order.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice

from harness.device.caching_allocator import CachingAllocator, OutOfMemory
from harness.device.replay import CACHE_EMPTIED, Step, follow
from harness.ledger.events import Storage
from harness.ledger.reconcile import Exhausted

MOST = 8
"""So many steps are followed at most where the allocator's blocks never come to lie as before."""


class Later:
    """The steps after training step `number`, which was `last` to the allocator."""

    def __init__(self, last: Sequence[Step], number: int) -> None:
        self._last, self._number = last, number
        self._births = {key: place for place, (key, delta, _) in enumerate(last) if delta > 0}
        self._of_before = _freed_of_before(last, self._births)
        self.followed: list[Step] = []
        """What the allocator was asked to do in them."""
        self.reserved = 0
        """The most that it has in segments then, in bytes."""
        self.exhausted: Exhausted | None = None
        """The first allocation that it has no room for."""

    @property
    def repeats(self) -> bool:
        """Whether the step repeats: what it frees of an earlier one is what it leaves to a later one."""
        return self._of_before is not None

    def follow(self, allocator: CachingAllocator, more: int) -> None:
        """Let `allocator` take as many as `more` of them, until its memory is used up, or all others do the same."""
        self.reserved, known = allocator.reserved, set[int]()
        for number, steps in enumerate(islice(self._steps(), min(more, MOST)), self._number + 1):
            for place, step in enumerate(steps):
                self.followed.append(step)
                try:
                    follow(allocator, step)
                except OutOfMemory:
                    self.exhausted = self._missing(place, number)
                    return
                self.reserved = max(self.reserved, allocator.reserved)
            places = {step[0]: place for place, step in enumerate(steps)}
            lies = hash(tuple((block, places.get(key, key)) for block, key in allocator.layout()))
            if lies in known:
                return
            known.add(lies)

    def _steps(self) -> Iterator[list[Step]]:
        """What the allocator is asked to do in each. The keys of a step's storages are its own."""
        of_before = self._of_before or {}
        before: dict[int, Hashable] = {place: key for key, place in self._births.items()}
        while True:
            own: dict[int, Hashable] = {place: object() for place in before}
            yield [
                step
                if step is CACHE_EMPTIED
                else (own[self._births[step[0]]], *step[1:])
                if step[0] in self._births
                else (before[of_before[step[0]]] if step[0] in of_before else step[0], *step[1:])
                for step in self._last
            ]
            before = own

    def _missing(self, place: int, number: int) -> Exhausted:
        storage, nbytes, _ = self._last[place]
        assert isinstance(storage, Storage)
        return Exhausted(storage.where._replace(step=number), storage.module, storage.op, nbytes)


def _freed_of_before(last: Sequence[Step], births: dict[Hashable, int]) -> dict[Hashable, int] | None:
    """Of each storage that `last` frees and an earlier step allocated the place where `last` allocates its successor.

    None where these are not as many of each kind.
    """
    freed = {key for key, delta, _ in last if delta < 0}
    of_before = sorted((key for key in freed if key not in births), key=lambda storage: storage.born)  # type: ignore[attr-defined]
    left: defaultdict[Hashable, deque[int]] = defaultdict(deque)
    for key, place in births.items():
        if key not in freed:
            left[_kind(key)].append(place)
    if Counter(map(_kind, of_before)) != {kind: len(places) for kind, places in left.items()}:
        return None
    return {key: left[_kind(key)].popleft() for key in of_before}


def _kind(storage: Hashable) -> Hashable:
    assert isinstance(storage, Storage)
    return storage.nbytes, storage.op, storage.module, storage.where[1:]
