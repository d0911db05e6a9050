"""How many forwards wait for their backward at once, and what each keeps until then. Plain data in and out.

Each is one micro-batch's, alive from the first activation that autograd saves in it until its backward is over. A
pipeline of P stages under 1F1B has min(P - stage, m) of them, of m micro-batches; inference has none.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from harness.ledger.events import Event, Where


@dataclass(frozen=True)
class Forwards:
    """The most forwards that were alive at once, and the bytes that each had saved by then, the oldest first."""

    alive: int = 0
    stashes: tuple[int, ...] = ()
    where: Where | None = None


def most_saved(events: Iterable[Event]) -> int:
    """The most bytes of activations that autograd kept for backward at once."""
    now = most = 0
    for event in events:
        now += event.saves
        most = max(most, now)
    return most


def in_flight(events: Iterable[Event]) -> Forwards:
    """The most forwards alive in the story that `events` tell; of moments with as many, the one of most bytes."""
    stash: dict[Where, int] = {}
    over: set[Where] = set()
    now, most = Where(0, "idle", 0), Forwards()
    for event in events:
        storage = event.storage
        if storage is None:
            if now.phase == "backward" and event.where != now:
                done = now._replace(phase="forward")
                over.add(done)
                stash.pop(done, None)
            now = event.where
        elif (
            (made := storage.where).phase == "forward"
            and storage.category == "activations"
            and storage.saved_at is not None
            and made not in over
        ):
            if event.saved:
                stash[made] = stash.get(made, 0) + storage.nbytes
                if (len(stash), sum(stash.values())) > (most.alive, sum(most.stashes)):
                    most = Forwards(len(stash), tuple(stash.values()), event.where)
            elif event.delta < 0:
                stash[made] = stash.get(made, 0) - storage.nbytes
    return most
