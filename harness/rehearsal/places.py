"""How far a rehearsal is: at which step and layer each rehearsed rank is now, out of how many layers in all.

A thread looks at the ledger a few times a second, so that nothing is done for each layer. A rank in another process
leaves what it sees in a file.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from harness.ledger import Ledger, Where
from harness.model.plan import Plan
from harness.rehearsal.representatives import Representative
from harness.runtime.files import put
from harness.runtime.progress import Pace

EVERY = 0.2
"""Seconds between two looks."""

LAYER = re.compile(r"\.(\d+)(\.|$)")
"""The number of a layer in the name of a module."""


class Place(NamedTuple):
    """A moment of a rehearsed rank, and the module that is running; empty: none."""

    where: Where
    module: str

    @property
    def layer(self) -> int | None:
        """The number of the layer, if it is in one."""
        number = LAYER.search(self.module)
        return None if number is None else int(number[1])


@contextmanager
def watched(ledger: Ledger, report: Callable[[Place], object] | None) -> Iterator[None]:
    """Inside this context `report` receives the place of this rank, a few times a second and in a thread of its own."""
    if report is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY):
            report(Place(ledger.where, ledger.module))

    thread = threading.Thread(target=watch, name="places", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def leave(file: Path, place: Place) -> None:
    """Write `place` to `file`, for `left`."""
    with suppress(OSError):
        put(file, json.dumps(place))


def left(file: Path) -> Place | None:
    """What another process left in `file`; None: nothing yet."""
    try:
        where, module = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Place(Where(*where), module)


class Distance:
    """How many layers a rank has passed. In each step every micro-batch passes its layers forward, and in training
    backward too; of generation's tokens only those of the prompts count.
    """

    def __init__(self, plan: Plan, representative: Representative) -> None:
        settings = plan.settings
        self.training = settings.mode == "train"
        self.layers = plan.layers[representative.stage]
        self.micro_batches = settings.train.accumulation if self.training else 1
        self.steps = min(settings.ledger.steps, _steps(plan))
        self.passes = self.micro_batches * len(self.layers) * (1 + self.training)
        self.in_turn = self.training and plan.layout.stages == 1  # each backward before the next forward
        self.done, self._step, self._forward, self._backward = 0, 0, 0, 0

    @property
    def total(self) -> int:
        """The layers of the whole rehearsal of this rank."""
        return self.steps * self.passes

    def to(self, place: Place) -> int:
        """The layers that are passed at `place`; never fewer than before."""
        step, phase, micro_batch = place.where
        if step != self._step:
            self._step, self._forward, self._backward = step, 0, 0
        layers, number = len(self.layers), place.layer
        within = (
            0 if number is None else (number - self.layers.start) % layers
        )  # a stage may number its own from 0
        before = micro_batch * layers
        if phase in ("forward", "prefill"):
            self._forward = max(self._forward, before + within)
            self._backward = max(self._backward, before if self.in_turn else 0)
        elif phase == "backward":
            self._forward = max(self._forward, before + layers)
            self._backward = max(self._backward, before + (0 if number is None else layers - 1 - within))
        elif phase == "step":
            self._forward = self.passes
        elif phase not in ("decode", "data"):  # before the first step, and after the last
            return self.done
        in_step = min(self.passes, self._forward + self._backward)
        self.done = max(self.done, min(self.total, step * self.passes + in_step))
        return self.done


def _steps(plan: Plan) -> int:
    """The most steps, or batches, of a run of `plan`."""
    generation = plan.settings.generation
    if plan.settings.mode == "train":
        return plan.settings.train.steps
    if generation.prompts or generation.workload:
        return plan.settings.ledger.steps
    prompts = len(generation.prompt) or generation.count
    return -(-prompts // (generation.batch * plan.layout.dp_size))


class Progress:
    """The bar of a rehearsal: the layers of all `representatives`, and where those that run are."""

    def __init__(self, plan: Plan, representatives: Sequence[Representative], pace: Pace) -> None:
        self.pace = pace
        self.roles = {each.rank: _role(each) for each in representatives}
        self.distances = {each.rank: Distance(plan, each) for each in representatives}
        self._running: dict[int, Place] = {}

    def at(self, rank: int, place: Place | None) -> None:
        """Rank `rank` is at `place`; None: it has ended."""
        distance = self.distances[rank]
        if place is None:
            self._running.pop(rank, None)
            distance.done = distance.total
        else:
            self._running[rank] = place
            distance.to(place)
        self.pace.up_to(sum(each.done for each in self.distances.values()))

    def text(self) -> str:
        """Where a rank that runs is: each of them in turn."""
        rank = next(iter(self._running), None)
        if rank is None:
            return ""
        place = self._running[rank] = self._running.pop(rank)  # it is the last in the next turn
        return (
            f"{_described(place, self.distances[rank])}, {self.roles[rank]}"  # a narrow terminal cuts the end
        )


def layers_of(plan: Plan, representatives: Sequence[Representative]) -> int:
    """The layers that the rehearsals of all `representatives` pass."""
    return sum(Distance(plan, each).total for each in representatives)


def _role(representative: Representative) -> str:
    role = representative.why.partition(";")[0]
    return f"rank {representative.rank}" + (f" ({role})" if role else "")


def _described(place: Place, distance: Distance) -> str:
    step, phase, _ = place.where
    if phase in ("idle", "setup"):
        return "set-up"
    layer = "" if place.layer is None else f" of layer {place.layer}"
    return f"{'optimizer' if phase == 'step' else phase}{layer}, step {step + 1}/{distance.steps}"
