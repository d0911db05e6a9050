"""Reads the pages in `conf/hardware`: what a device can do. It imports no torch."""

from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter

from harness.config.compose import directory, groups
from harness.config.settings import Hardware


def named(name: str) -> Hardware:
    """The hardware page of that name. Raises ValueError if there is none, or if it has no rates."""
    pages = {each: _read(each) for each in groups()["hardware"]}
    rated = {each: page for each, page in pages.items() if page.bandwidth is not None}
    if name not in rated:
        raise ValueError(f"hardware={name}: no page with rates has that name; one of {', '.join(rated)}")
    return rated[name]


def ceilings(hardware: Hardware, dtype: str) -> dict[str, Any] | None:
    """The record's `ceilings` for operations on `dtype`, from a page; None where the page has no rates.

    bf16 and fp16 both use the dense bf16 rate. These runs cannot reach the sparse rate, nor the rate that accumulates
    in fp16.
    """
    flops = hardware.flops_bf16 if dtype in ("bfloat16", "float16") else None
    if hardware.bandwidth is None and flops is None:
        return None
    return {"source": hardware.name, "bandwidth": hardware.bandwidth, "flops": flops, "dtype": dtype}


def _read(name: str) -> Hardware:
    page: Any = OmegaConf.to_container(OmegaConf.load(directory() / "hardware" / f"{name}.yaml"))
    return TypeAdapter(Hardware).validate_python(page)
