"""The figures of a step that has just ended, for a display: cheap, and before the ledger's account."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.ledger.categories import CATEGORIES
from harness.ledger.events import Storage
from harness.ledger.log import Log


@dataclass
class Stretch:
    """The most bytes of a stretch of the run. What was not measured is not there.

    Under an exact ledger `bytes` is the most that all storages had, without scratch inside operators; `at_peak` is what
    they were at that moment, and `peaks` has each category's own most. Afterwards only `owned` is known: the most that
    owners had at the end of a phase, by category.
    """

    bytes: int | None = None
    at_peak: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    owned: dict[str, int] = field(default_factory=dict)


class Recent:
    """What a ledger's log saw since its figures were last taken. One pass backwards over the new events."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.restart()

    def restart(self) -> None:
        """Begin again, with a log that is empty."""
        self._events_read, self._stretch = 0, Stretch()
        self.highest: int | None = None  # the most bytes so far

    def take(self) -> Stretch:
        """The stretch since the last call."""
        self.look()
        stretch, self._stretch = self._stretch, Stretch()
        return stretch

    def look(self) -> None:
        """Read the events since the last look. The categories are those that are known now."""
        log, stretch = self._log, self._stretch
        if not log.recording:
            return
        totals, end, living = dict.fromkeys(CATEGORIES, 0), -1, list[Storage]()
        while end != len(log.events):  # the garbage collector, or a thread, may free a storage meanwhile
            end, living = len(log.events), log.living()
        for alive in living:
            totals[alive.category] += alive.nbytes
        total = sum(totals.values())
        highest, at_peak, peaks = total, {**totals}, {**totals}
        for index in range(end - 1, self._events_read - 1, -1):  # back to what was alive before each
            _, delta, storage, *_ = log.events[index]
            if storage is None or not delta or (delta > 0 and storage.base):
                continue
            total -= delta
            totals[storage.category] -= delta
            peaks[storage.category] = max(peaks[storage.category], totals[storage.category])
            if total > highest:
                highest, at_peak = total, {**totals}
        self._events_read = end
        self.highest = max(self.highest or 0, highest)
        if stretch.bytes is None or highest > stretch.bytes:
            stretch.bytes, stretch.at_peak = highest, at_peak
        stretch.peaks = {name: max(own, stretch.peaks.get(name, 0)) for name, own in peaks.items()}

    def phase_ended(self, totals: Mapping[str, int | None]) -> None:
        """Owners have these bytes at the end of a phase that no log saw."""
        owned = self._stretch.owned
        owned.update({name: max(own, owned.get(name, 0)) for name, own in totals.items() if own is not None})
