"""What a `hardware=` page says that a device can do. It reads no torch."""

from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter

from harness.config.compose import directory, groups
from harness.config.settings import Hardware


def named(name: str) -> Hardware:
    """The page of that name. Raises ValueError where there is none with rates."""
    pages = {each: _read(each) for each in groups()["hardware"]}
    rated = {each: page for each, page in pages.items() if page.bandwidth is not None}
    if name not in rated:
        raise ValueError(f"hardware={name}: no page with rates has that name; one of {', '.join(rated)}")
    return rated[name]


def ceilings(hardware: Hardware, dtype: str) -> dict[str, Any] | None:
    """The record's `ceilings` for operations on `dtype`, by a page; None where it has no rates.

    Its dense rate of bf16 counts, and for fp16 too: a sparse one, or one that adds up in fp16, is none that these runs
    can reach.
    """
    flops = hardware.flops_bf16 if dtype in ("bfloat16", "float16") else None
    if hardware.bandwidth is None and flops is None:
        return None
    return {"source": hardware.name, "bandwidth": hardware.bandwidth, "flops": flops, "dtype": dtype}


def _read(name: str) -> Hardware:
    page: Any = OmegaConf.to_container(OmegaConf.load(directory() / "hardware" / f"{name}.yaml"))
    return TypeAdapter(Hardware).validate_python(page)
