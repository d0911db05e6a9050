"""How many forwards wait for their backward at once, and how many bytes each has saved. Plain data in and out.

One forward belongs to one micro-batch. It is alive from the first activation that autograd saves in it until its
backward ends, or until nothing that it saved is left. A pipeline of P stages under 1F1B has min(P - stage, m) of them,
for m micro-batches. Inference has none.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from harness.ledger.events import Event, Where


@dataclass(frozen=True)
class Forwards:
    """The most forwards alive at once, and the bytes that each had saved at that moment, the oldest first."""

    alive: int = 0
    saved_bytes: tuple[int, ...] = ()
    where: Where | None = None


def most_saved(events: Iterable[Event]) -> int:
    """The most activation bytes that autograd kept for backward at once."""
    saved = most = 0
    for event in events:
        saved += event.saves
        most = max(most, saved)
    return most


def in_flight(events: Iterable[Event]) -> Forwards:
    """The most forwards alive at one moment of `events`. Of moments with equally many, the one with the most bytes."""
    saved_bytes: dict[Where, int] = {}
    finished: set[Where] = set()
    phase_now, most = Where(0, "idle", 0), Forwards()
    for event in events:
        storage = event.storage
        if storage is None:
            if phase_now.phase == "backward" and event.where != phase_now:
                forward = phase_now._replace(phase="forward")
                finished.add(forward)
                saved_bytes.pop(forward, None)
            phase_now = event.where
        elif (
            (origin := storage.where).phase == "forward"
            and storage.category == "activations"
            and storage.saved_at is not None
            and origin not in finished
        ):
            if event.saved:
                saved_bytes[origin] = saved_bytes.get(origin, 0) + storage.nbytes
                if (len(saved_bytes), sum(saved_bytes.values())) > (most.alive, sum(most.saved_bytes)):
                    most = Forwards(len(saved_bytes), tuple(saved_bytes.values()), event.where)
            elif event.delta < 0 and origin in saved_bytes:
                saved_bytes[origin] -= storage.nbytes
                if not saved_bytes[origin]:  # its backward has run, in one phase with another forward's
                    del saved_bytes[origin]
    return most
