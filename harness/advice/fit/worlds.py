"""The smallest world in which anything fits, for `harness fit world.size=?` or a list.

Worlds are tried from the smallest: each power of two, and on several nodes then each number of whole nodes between the
last that is too small and the first that is not. Of a large model a few layers say what to expect of each world, and
the smallest that is expected to be enough is rehearsed, then the next, until something fits; then the one before, if it
was only expected to be too small. A small model is rehearsed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import lcm, prod
from typing import NamedTuple

from harness.advice.fit.answer import NODE, Answer
from harness.advice.fit.axes import OPEN, SPLITS
from harness.advice.fit.cheapest import Cheapest, Leanest, Lowest
from harness.advice.fit.combination import short
from harness.advice.fit.request import Request, positive_integer
from harness.advice.fit.search import search
from harness.advice.fit.trials import Known, Search, Trials
from harness.config.settings import Refusal
from harness.config.variants import Variants
from harness.runtime.progress import aside
from harness.tables import size

KEY = "world.size"

MOST = 4096
"""The largest world that `?` tries."""


LEVEL, LESS = 64, 0.99
"""Above so many ranks, a world that needs more than this part of what half of it needs is the last that is tried."""


REFUSED = "refused: "


class Tried(NamedTuple):
    """A world of `size` ranks, whether something fits, and what was seen there, as a sentence."""

    size: int
    fits: bool
    seen: str
    needs: int | None = None
    """The bytes that the config needs which needs least. None: not known."""
    expected: bool = False
    """Whether that is what a few layers let expect, and was not rehearsed."""

    @property
    def refused(self) -> bool:
        """Whether every config is refused there."""
        return self.seen.startswith(REFUSED)


def open_worlds(overrides: Sequence[str]) -> str | None:
    """The list of worlds in a request whose file is expanded, or `?`; None where it names one world, or none."""
    typed = dict(override.partition("=")[::2] for override in overrides)
    worlds = typed.get(KEY, "")
    return worlds if worlds == OPEN or "," in worlds else None


class Worlds:
    """The search over the worlds of a request: `worlds` is `?` or a list. Raises what a request of one world raises."""

    def __init__(self, overrides: Sequence[str], reserve: int, worlds: str) -> None:
        self.overrides = [each for each in overrides if not each.startswith(f"{KEY}=")]
        self.reserve = reserve
        typed = dict(each.partition("=")[::2] for each in self.overrides)
        self.unit = prod(
            int(typed[key]) for key in SPLITS if typed.get(key, "").isdecimal() and int(typed[key])
        )
        """Each world is a multiple of it: stages, and ranks that share layers, divide a world evenly."""
        per_node = typed.get("world.per_node", "")
        self.node = int(per_node) if per_node.isdecimal() and int(per_node) else None
        self.step = lcm(self.node or NODE, self.unit)
        self.listed = (
            sorted({positive_integer(KEY, each) for each in worlds.split(",")}) if worlds != OPEN else []
        )
        self.tried: list[Tried] = []
        self.not_tried: list[str] = []
        """Configs of the answer's world that may fit too, and are expected to be less cheap."""
        self._variants: Variants | None = None
        self._known = Known({}, {})
        self._came_to: list[float] = []  # as the last search has it
        self._large = False  # whether a few layers say what to expect
        self._times = 1.0
        """How many times what is expected a rehearsal has come to: a GPU's allocator has more beside."""
        # by world: the bytes of what is expected to need least, the room, and what it is
        self._expected: dict[int, tuple[int, int, str]] = {}
        self._doubted: int | None = None  # the world that is rehearsed though nothing is expected to fit
        self._best: Answer | None = None  # that for the smallest world in which something fits
        self._refusal: Refusal | None = None
        self._last: Answer | None = None

    def run(self) -> Answer:
        """The answer for the smallest world in which something fits, or the smallest so far where Ctrl-C ends it; where
        nothing does, for the last that was tried. `tried` has all worlds by then.
        """
        try:
            return self._found()
        except KeyboardInterrupt:
            known = self._best or self._last
            if known is None or not known.trials:
                raise
            return replace(known, interrupted=True)

    def _found(self) -> Answer:
        step, above = 0 if self.listed else self.step, 0
        while True:
            most = self._best.request.world if self._best else None
            world = smallest(self._may_fit, self._candidates(above, most), step, above)
            if world == most:  # nothing smaller is expected to be enough: one is rehearsed in spite of that
                world = self._doubtful(most)
            if world is None:
                break
            answer = self._answer(world)
            if answer.fitting:
                self._best = answer
            elif world == self._doubted:
                break
            else:
                above = world
        known = self._best or self._last
        if known is None:
            assert self._refusal is not None
            raise self._refusal
        return known

    def _doubtful(self, most: int | None) -> int | None:
        """Of the worlds that only a few layers take for too small, the next below `most`; without it, the most
        promising. None: it was rehearsed, or shapes alone rule it out.
        """
        expected = {each.size: each.needs or 0 for each in self.tried if each.expected}
        if most is None:
            self._doubted = min(expected, key=lambda size: expected[size], default=None)
            return self._doubted
        smaller = (each.size for each in self.tried if each.size < most and not each.refused)
        self._doubted = max(smaller, default=None)
        return self._doubted if self._doubted in expected else None

    def _answer(self, world: int) -> Answer:
        """What fits in `world`, by rehearsals: of a large model the cheapest alone of what is expected to fit; where
        nothing is, what is expected to need least.
        """
        nbytes, room, _ = self._expected.get(world, (0, 0, ""))
        doubted = nbytes > room  # that it fits
        one = Leanest() if doubted else Cheapest()
        answer = self._learnt(world, one if self._large else search)
        if self._came_to and doubted:
            self._times = min(self._came_to)
        elif self._came_to and not answer.fitting:
            self._times = max(self._times, min(self._came_to))
        if answer.fitting:
            self.not_tried = [" ".join(short(each.overrides)) for each in one.not_tried]
        self._add(Tried(world, bool(answer.fitting), seen(answer)))
        return answer

    def _learnt(self, world: int, search: Search) -> Answer:
        """What is known of `world` after `search`. Raises KeyboardInterrupt after Ctrl-C."""
        trials = Trials(self._request(world), self._known)
        self._last, self._came_to = trials.answer(search), trials.came_to
        if self._last.interrupted:
            raise KeyboardInterrupt
        return self._last

    def _candidates(self, above: int, most: int | None = None) -> Iterator[int]:
        """The worlds of more than `above` ranks: those listed, else doubles of the smallest up to `MOST`, as long as
        a larger one needs less. Those below `most` and then that, if it is known to be enough.
        """
        if most is not None:
            yield from (each for each in self._candidates(above) if each < most)
            yield most
            return
        if self.listed:
            yield from (each for each in self.listed if each > above)
            return
        doubles = [self.unit * 2**power for power in range(MOST.bit_length())]
        if self.node is not None:
            doubles = [each for each in doubles if each < self.node]
            doubles += [self.step * 2**power for power in range(MOST.bit_length())]
        if above >= self.step and above % self.step == 0:  # it was nearly enough: look close to it first
            doubles = [above + self.step * 2**power for power in range(MOST.bit_length())]
        for world in doubles:
            if not above < world <= MOST:
                continue
            yield world
            before, after = ([0, 0] + [each.needs or 0 for each in self.tried])[-2:]
            if world > LEVEL and before and after > LESS * before:
                return

    def _may_fit(self, world: int) -> bool:
        """Whether something fits in a world of so many ranks, or is expected to."""
        for each in self.tried:
            if each.size == world and not each.expected:
                return each.fits
        if world in self._expected:
            return self._is_expected(world)
        lowest = Lowest(self._times)
        try:
            answer = self._learnt(world, lowest)
        except Refusal as refusal:
            self._refusal = refusal
            return self._add(Tried(world, False, f"{REFUSED}{refusal}"))
        if lowest.expected is not None and not answer.fitting:
            self._large = True
            nbytes, combination = lowest.expected
            self._expected[world] = nbytes, answer.request.room, " ".join(short(combination.overrides))
            return self._is_expected(world)
        needs = min((trial.worst.needs for trial in answer.rehearsed), default=None)
        return self._add(Tried(world, bool(answer.fitting), seen(answer), needs))

    def _is_expected(self, world: int) -> bool:
        nbytes, room, chosen = self._expected[world]
        nbytes = int(nbytes * self._times)
        fits = nbytes <= room
        words = f"{'something' if fits else 'nothing'} is expected to fit, by a few layers: "
        words += f"{chosen} needs about {size(nbytes)} of {size(room)}"
        return self._add(Tried(world, fits, words, nbytes, expected=True))

    def _add(self, tried: Tried) -> bool:
        before = next((each for each in self.tried if each.size == tried.size), None)
        self.tried = [*(each for each in self.tried if each.size != tried.size), tried]
        again = before is not None and (before.fits, before.expected) == (tried.fits, tried.expected)
        if not tried.refused and not again:  # a refusal is said at the end, once where it is every world's
            aside(f"{KEY}={tried.size}: {tried.seen}")
        return tried.fits

    def _request(self, world: int) -> Request:
        request = Request([*self.overrides, f"{KEY}={world}"], self.reserve, self._variants)
        self._variants = request.variants
        return request


def smallest(fits: Callable[[int], bool], worlds: Iterable[int], node: int, below: int = 0) -> int | None:
    """The smallest of `worlds`, in their order, that `fits`; None: not one does. With a `node` of so many ranks also
    those numbers of whole nodes that lie between two of them; `below` is known to be too small. What fits in a world is
    taken to fit in each larger one.
    """
    for world in worlds:
        if fits(world):
            return _between(fits, below, world, node) if node else world
        below = world
    return None


def _between(fits: Callable[[int], bool], too_small: int, enough: int, node: int) -> int:
    """The smallest number of whole nodes that fits, above one world and up to another."""
    while True:
        inside = range((too_small // node + 1) * node, enough, node)
        if not inside:
            return enough
        middle = inside[len(inside) // 2]
        if fits(middle):
            enough = middle
        else:
            too_small = middle


def seen(answer: Answer) -> str:
    """What was seen in a world."""
    if answer.fitting:
        best = answer.fitting[0]
        return f"fits with {' '.join(short(best.overrides))}, {size(best.worst.needs)} of {size(answer.request.room)}"
    if not answer.known:
        return "not known: nothing could be rehearsed"
    nearest = answer.closest[0]
    least = "at least " * nearest.worst.bound
    how = f"{len(answer.rehearsed)} rehearsed" if answer.rehearsed else "by shapes alone"
    return f"nothing fits; {' '.join(short(nearest.overrides))} needs {least}{size(-nearest.left)} too much ({how})"
