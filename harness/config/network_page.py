"""Reads the pages in `conf/network`: what connects nodes. It imports no torch."""

import yaml
from pydantic import TypeAdapter

from harness.config.groups import directory, groups
from harness.config.settings import Network


def named(name: str) -> Network:
    """The network page of that name. Raises ValueError if there is none, or if it has no bandwidth."""
    names = [each for each in groups()["network"] if each != "auto"]
    if name not in names:
        raise ValueError(f"network={name}: no page with a bandwidth has that name; one of {', '.join(names)}")
    page = yaml.safe_load((directory() / "network" / f"{name}.yaml").read_text())
    return TypeAdapter(Network).validate_python(page)
