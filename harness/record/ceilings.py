"""The record's `ceilings`: what a device can do, by its hardware page or by measurement."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.record.results import Ceilings

if TYPE_CHECKING:
    from harness.config.settings import Hardware


def of_page(hardware: "Hardware", dtype: str) -> Ceilings | None:
    """The ceilings of operations on `dtype`, from a page; None where the page has no rates.

    bf16 and fp16 both use the dense bf16 rate. These runs cannot reach the sparse rate, nor the rate that accumulates
    in fp16.
    """
    flops = hardware.flops_bf16 if dtype in ("bfloat16", "float16") else None
    if hardware.bandwidth is None and flops is None:
        return None
    return Ceilings(source=hardware.name, bandwidth=hardware.bandwidth, flops=flops, dtype=dtype)


def of_ranks(rates: Sequence[tuple[float | None, float | None]], dtype: str) -> Ceilings:
    """The ceilings from the measured rates of all ranks, in bytes and operations per second: the lowest of each."""
    bandwidth, flops = (None if None in values else min(values) for values in zip(*rates, strict=True))
    return Ceilings(source="measured", bandwidth=bandwidth, flops=flops, dtype=dtype)
