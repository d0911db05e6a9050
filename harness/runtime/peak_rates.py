"""What a machine can do at most: bytes a second of a large copy, and operations a second of a large matrix product.

Every rank measures at once, as they run; the slowest counts. Where `hardware=` names a page with rates, those count.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.ledger.timer import moment, seconds
from harness.tables import count

SECONDS = 0.03
"""How long each is tried."""
COPIED = {"cpu": 2**27, "cuda": 2**30}
"""Bytes copied, more than caches hold."""
SMALLEST, LARGEST = 2**9, 2**13
"""Rows and columns of the first matrices tried, and of the last."""
ENOUGH = 0.01
"""Seconds that a product takes which is large enough."""

SMALL, TRIES = 192, 4
"""Rows of the products that show which precision a CPU is good at (14 MFLOP: without units for bf16 some 5 ms), and how
often each is tried: other work may be in the way."""
FASTER = 1.2
"""How much faster bf16 must be than fp32. With units it is twice as fast and more; without, three quarters as fast
where AVX512 stands in, and a fortieth elsewhere: no CPU is near, and the answer stays."""

Rates = tuple[float | None, float | None]
"""Bytes and operations a second; None: not measured."""


def of_ranks(rates: Sequence[Rates], dtype: str) -> dict[str, Any]:
    """The record's `ceilings` as the ranks measured them: the least of each."""
    bandwidth, flops = (None if None in each else min(each) for each in zip(*rates, strict=True))
    return {"source": "measured", "bandwidth": bandwidth, "flops": flops, "dtype": dtype}


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """This rank's, in about a tenth of a second. None for what cannot be tried, for want of memory."""
    return _bandwidth(device), _flops(device, dtype)


def _bandwidth(device: torch.device) -> float | None:
    size = COPIED["cuda" if device.type == "cuda" else "cpu"]
    while size >= 2**20:
        with suppress(RuntimeError):  # there is no room
            source = torch.ones(size, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            return 2 * size / _least(device, partial(target.copy_, source))
        size //= 2
    return None


def _flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of the largest product that is tried: each has twice the rows of the one before, until one takes long enough."""
    rate, rows = None, SMALLEST
    with suppress(RuntimeError):
        while rows <= LARGEST:
            rate = of_product(device, dtype, rows)
            if 2 * rows**3 / rate > ENOUGH:
                break
            rows *= 2
    return rate


def precision_of_cpu() -> tuple[str, str]:
    """The precision in which a core of this CPU multiplies faster, and by how much, in words; in some 40 ms.

    All cores at once would wait for each other more than they multiply.
    """
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tries = [
            [of_product(cpu, dtype, SMALL, 0.0) for dtype in (torch.bfloat16, torch.float32)]
            for _ in range(TRIES)
        ]
    finally:
        torch.set_num_threads(threads)
    half, full = map(max, zip(*tries, strict=True))
    told = f"a core here makes {count(half, 'FLOP/s')} in bf16 and {count(full, 'FLOP/s')} in fp32"
    return ("bf16" if half > FASTER * full else "fp32"), told


def of_product(device: torch.device, dtype: torch.dtype, rows: int, within: float = SECONDS) -> float:
    """Operations a second of a product of two square matrices, the best of those that end `within` so many seconds."""
    left, right = (torch.ones(rows, rows, dtype=dtype, device=device) for _ in range(2))
    return float(2 * rows**3 / _least(device, partial(torch.matmul, left, right), within))


def _least(device: torch.device, act: Callable[[], Tensor], within: float = SECONDS) -> float:
    """The fewest seconds that `act` takes, once it has been done."""
    act()
    return min(_timed(device, act, within))


def _timed(device: torch.device, act: Callable[[], Tensor], within: float) -> Iterator[float]:
    gpu, until = device.type == "cuda", time.perf_counter() + within
    while True:
        began = moment(gpu)
        act()
        ended = moment(gpu)
        if gpu:
            torch.cuda.synchronize(device)
        yield seconds(gpu, began, ended)
        if time.perf_counter() > until:
            return
