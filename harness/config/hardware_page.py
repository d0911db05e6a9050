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


def gpu(name: str) -> Hardware:
    """The page of that GPU. Raises ValueError if there is none."""
    names = groups()["hardware"]
    if name in names and (page := _read(name)).device == "cuda":
        return page
    gpus = [each for each in names if _read(each).device == "cuda"]
    raise ValueError(f"hardware={name}: no page of a GPU has that name; one of {', '.join(gpus)}")


def _read(name: str) -> Hardware:
    page: Any = OmegaConf.to_container(OmegaConf.load(directory() / "hardware" / f"{name}.yaml"))
    return TypeAdapter(Hardware).validate_python(page)
