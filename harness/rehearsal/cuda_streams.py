"""Stand-ins for the streams and events of the card: its work is done at once."""

import math
from typing import Any

from harness.rehearsal.card import CARD
from harness.rehearsal.card_memory import current


class Stream:
    """A stream of the card. Its work is done at once, so that nobody waits; what it allocates stays its own."""

    def __init__(
        self, device: Any = None, priority: int = 0, stream_id: int | None = None, **kwargs: Any
    ) -> None:
        self.device, self.priority = CARD, priority
        self.stream_id = self.cuda_stream = current().new_stream() if stream_id is None else stream_id
        self._before: list[int] = []  # it may be entered again inside

    def wait_stream(self, stream: Any) -> None:
        """Return at once, as do all others that wait."""

    wait_event = wait_stream

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Whether all work is done."""
        return True

    def is_capturing(self) -> bool:
        """Whether a graph is captured: never."""
        return False

    def record_event(self, event: Any = None) -> Any:
        """`event`, or a new one."""
        return event or Event()

    def __enter__(self) -> "Stream":
        self._before.append(current().stream)
        current().enter_stream(self.stream_id)
        return self

    def __exit__(self, *exc: object) -> None:
        current().enter_stream(self._before.pop())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class Event:
    """An event of the card. It has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take any options of the original."""

    def record(self, stream: Any = None) -> None:
        """Return at once, as does `wait`."""

    wait = record

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, end_event: Any) -> float:
        """Not a number: a rehearsal measures no time."""
        return math.nan


class Ranges:
    """NVTX's functions: they mark ranges of time for a profiler, and here there is none."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: 0
