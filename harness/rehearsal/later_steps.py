"""What a GPU's allocator does in the steps of training after those that were rehearsed: each repeats the last.

A step may be out of memory though it allocates no more than the one before. Where memory is nearly full, the allocator
empties its cache, and what it reserves next lies in another order.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain, islice

from harness.device.caching_allocator import CachingAllocator, OutOfMemory
from harness.device.replay import CACHE_EMPTIED, Step, follow
from harness.ledger.events import Storage
from harness.ledger.reconcile import Exhausted

MOST = 8
"""So many steps are followed at most where the allocator's blocks never come to lie as before."""

STEP = ("data", "forward", "backward", "step")
"""The phases of a step that repeats. A validation or a checkpoint belongs to some steps only."""


class Later:
    """The steps after training step `number`, which was `last` to the allocator."""

    def __init__(self, last: Sequence[Step], number: int) -> None:
        self._last, self._number = last, number
        self._births = {key: place for place, (key, delta, _) in enumerate(last) if delta > 0}
        self._of_before = _freed_of_before(last, self._births)
        self.reserved = 0
        """The most that the allocator has in segments in them, in bytes; where its memory is used up, that and what is
        missing.
        """
        self.exhausted: Exhausted | None = None
        """The first allocation that there is no room for."""
        self._followed = 0

    @property
    def repeats(self) -> bool:
        """Whether the step repeats: what it frees of an earlier one is what it leaves to a later one."""
        phases = {key.where.phase for key in self._births if isinstance(key, Storage)}
        return self._of_before is not None and phases.issubset(STEP)

    @property
    def followed(self) -> list[Step]:
        """What the allocator is asked to do in the steps that were followed, the last of them whole."""
        return [*chain.from_iterable(islice(self._steps(), self._followed))]

    def follow(self, allocator: CachingAllocator, more: int) -> None:
        """Let `allocator` take as many as `more` of them, until its memory is used up, or all others do the same."""
        self.reserved, known = allocator.reserved, {_lies(allocator, self._births)}
        for steps in islice(self._steps(), min(more, MOST)):
            self._followed += 1
            allocator.synchronize()  # the step has read the loss of the one before
            for place, step in enumerate(steps):
                try:
                    follow(allocator, step)
                except OutOfMemory as missing:
                    self.reserved = max(self.reserved, missing.reserved + missing.segment)
                    self.exhausted = self._missing(place)
                    return
                self.reserved = max(self.reserved, allocator.reserved)
            lies = _lies(allocator, {step[0]: place for place, step in enumerate(steps)})
            if lies in known:
                return
            known.add(lies)

    def _steps(self) -> Iterator[list[Step]]:
        """What the allocator is asked to do in each. The keys of a step's storages are its own."""
        of_before, births = self._of_before or {}, self._births
        before: dict[int, Hashable] = {place: key for key, place in births.items()}
        while True:
            own: dict[int, Hashable] = {place: object() for place in before}
            keys = {key: own[place] for key, place in births.items()}
            keys.update({key: before[place] for key, place in of_before.items()})
            yield [
                step if step is CACHE_EMPTIED else (keys.get(step[0], step[0]), *step[1:])
                for step in self._last
            ]
            before = own

    def _missing(self, place: int) -> Exhausted:
        storage, nbytes, _ = self._last[place]
        assert isinstance(storage, Storage)
        where = storage.where._replace(step=self._number + self._followed)
        return Exhausted(where, storage.module, storage.op, nbytes)


def _lies(allocator: CachingAllocator, places: Mapping[Hashable, int]) -> int:
    """How the blocks lie, and what is in them: of a step's storages the place where it allocates them."""
    return hash(tuple((block, places.get(key, key)) for block, key in allocator.layout()))


def _freed_of_before(last: Sequence[Step], births: Mapping[Hashable, int]) -> dict[Hashable, int] | None:
    """Of each storage that `last` frees and an earlier step allocated the place where `last` allocates its successor.

    None where these are not as many of each kind.
    """
    freed = dict.fromkeys(key for key, delta, _ in last if delta < 0)
    of_before = [key for key in freed if key not in births and isinstance(key, Storage)]
    of_before.sort(key=lambda storage: storage.born)
    left: defaultdict[Hashable, deque[int]] = defaultdict(deque)
    for key, place in births.items():
        if key not in freed and isinstance(key, Storage):
            left[_kind(key)].append(place)
    if Counter(map(_kind, of_before)) != {kind: len(places) for kind, places in left.items()}:
        return None
    return {key: left[_kind(key)].popleft() for key in of_before}


def _kind(storage: Storage) -> Hashable:
    return storage.nbytes, storage.op, storage.module, storage.where[1:]
