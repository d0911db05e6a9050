"""Timestamps of a device's work, taken without waiting for it, and the seconds of phases between them."""

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from harness.ledger.events import Where


def moment(gpu: bool) -> Any:
    """A timestamp of now. On a GPU, the time by its own clock when its queue reaches this point."""
    if not gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(gpu: bool, began: Any, ended: Any) -> float:
    """Seconds between two timestamps. A GPU must have reached both."""
    return float(began.elapsed_time(ended)) / 1000 if gpu else float(ended - began)


class Times:
    """Seconds of each phase by step, summed over micro-batches. It waits for the device only in `by_phase`."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._seconds: dict[str, dict[int, float]] = {}
        self._pending: deque[tuple[Where, Any, Any]] = deque()

    def moment(self) -> Any:
        """A timestamp of this device."""
        return moment(self._gpu)

    def add(self, where: "Where", began: Any) -> None:
        """Add phase `where`, which began at timestamp `began` and ends now."""
        self._pending.append((where, began, self.moment()))
        while self._pending and (not self._gpu or self._pending[0][2].query()):
            self._settle()

    def by_phase(self) -> dict[str, dict[int, float]]:
        """The seconds of each phase by step, of everything that was added."""
        if self._gpu and self._pending:
            torch.cuda.synchronize()
        while self._pending:
            self._settle()
        return self._seconds

    def _settle(self) -> None:
        where, began, ended = self._pending.popleft()
        steps = self._seconds.setdefault(where.phase, {})
        steps[where.step] = steps.get(where.step, 0.0) + seconds(self._gpu, began, ended)
