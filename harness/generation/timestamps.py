"""Moments of a device's work, taken without waiting for it."""

import time
from typing import Any

import torch

from harness.ledger.timer import moment, seconds


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Marks:
    """Moments at which the device came to where its caller marked; on a GPU, by its own clock."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self._began = clock(device)
        self._first = moment(self.gpu)
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Now, or once the device comes to here."""
        self._marks.append(moment(self.gpu))

    def moments(self) -> list[float]:
        """The seconds of each mark on the clock of `clock`; the device must have come to all of them."""
        if self.gpu:
            return [self._began + seconds(True, self._first, mark) for mark in self._marks]
        return self._marks
