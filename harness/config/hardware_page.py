"""Reads the pages in `conf/hardware`: what a device can do. It imports no torch."""

import re
from itertools import pairwise

import yaml
from pydantic import TypeAdapter

from harness.config.groups import directory, groups
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


OTHER_CARDS = frozenset({"laptop", "mobile", "ti", "super", "d", "nvl", "mig", "max"})
"""Words in a GPU's name that make it another card than the page that has the rest of the name."""
ALIASES = {"hbm3": "sxm"}
"""What a GPU's name says instead of a word of its page: an H100 SXM is `NVIDIA H100 80GB HBM3`."""


def of_device(device_name: str) -> str | None:
    """The page of the GPU that CUDA calls `device_name`, as `NVIDIA GeForce RTX 4090`. None if there is none."""
    words = re.findall("[a-z0-9]+", device_name.lower())
    known = {*words, *map("".join, pairwise(words)), *(ALIASES[word] for word in words if word in ALIASES)}
    if known & OTHER_CARDS:
        return None
    pages = (name for name in groups()["hardware"] if known.issuperset(name.split("-")))
    return max(pages, key=len, default=None)


def link_of(device_name: str) -> str | None:
    """What connects GPUs that CUDA calls `device_name` on a node. None: no page says it."""
    page = of_device(device_name)
    return None if page is None else gpu(page).link_kind


def _read(name: str) -> Hardware:
    page = yaml.safe_load((directory() / "hardware" / f"{name}.yaml").read_text())
    return TypeAdapter(Hardware).validate_python(page)
