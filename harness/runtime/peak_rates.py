"""The limits of a machine: bytes per second of a large copy, operations per second of a large matrix product.

All ranks measure at once, as they run; the slowest rank counts. If `hardware=` names a page with rates, those count.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from harness.ledger.timer import moment, seconds

SECONDS = 0.03
"""Seconds of each measurement."""
COPIED = {"cpu": 2**27, "cuda": 2**30}
"""Bytes of the copy, more than caches can store."""
SMALLEST, LARGEST = 2**9, 2**13
"""Rows and columns of the first matrices tried, and of the last."""
ENOUGH = 0.01
"""Seconds of a product that is large enough."""

Rates = tuple[float | None, float | None]
"""Bytes per second and operations per second. None: not measured."""


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """This rank's rates, in about 0.1 s. None for a measurement that needs more memory than there is."""
    return _bandwidth(device), _flops(device, dtype)


def _bandwidth(device: torch.device) -> float | None:
    size = COPIED["cuda" if device.type == "cuda" else "cpu"]
    while size >= 2**20:
        with suppress(RuntimeError):  # not enough memory
            source = torch.ones(size, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            return 2 * size / _fewest_seconds(device, partial(target.copy_, source))
        size //= 2
    return None


def _flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of the largest product. Rows double until one product takes long enough."""
    rate, rows = None, SMALLEST
    with suppress(RuntimeError):
        while rows <= LARGEST:
            rate = _of_product(device, dtype, rows)
            if 2 * rows**3 / rate > ENOUGH:
                break
            rows *= 2
    return rate


def _of_product(device: torch.device, dtype: torch.dtype, rows: int) -> float:
    """Operations per second of a product of two square matrices."""
    left, right = (torch.ones(rows, rows, dtype=dtype, device=device) for _ in range(2))
    return float(2 * rows**3 / _fewest_seconds(device, partial(torch.matmul, left, right)))


def _fewest_seconds(device: torch.device, act: Callable[[], Tensor]) -> float:
    """The fewest seconds that `act` takes, after one run as warm-up."""
    act()
    return min(_timings(device, act))


def _timings(device: torch.device, act: Callable[[], Tensor]) -> Iterator[float]:
    gpu, until = device.type == "cuda", time.perf_counter() + SECONDS
    while True:
        began = moment(gpu)
        act()
        ended = moment(gpu)
        if gpu:
            torch.cuda.synchronize(device)
        yield seconds(gpu, began, ended)
        if time.perf_counter() > until:
            return
