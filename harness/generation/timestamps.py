"""Timestamps of a device's work, taken without waiting for it."""

import time
from typing import Any

import torch

from harness.ledger.timer import moment, seconds


def clock(device: torch.device) -> float:
    """The time in seconds, once the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Marks:
    """Timestamps of when the device reached each mark; on a GPU from CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self._began = clock(device)
        self._first = moment(self.gpu)
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Record a timestamp: now on a CPU, on a GPU when the device gets here."""
        self._marks.append(moment(self.gpu))

    def timestamps(self) -> list[float]:
        """The timestamp of each mark in seconds, on the clock of `clock`. The device must have reached all marks."""
        if self.gpu:
            return [self._began + seconds(True, self._first, mark) for mark in self._marks]
        return self._marks
