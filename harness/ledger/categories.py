"""What a live storage can be, and what its name comes to. No torch here: records are read without it."""

import re

CATEGORIES = (
    "parameters",
    "gathered",
    "gradients",
    "optimizer",
    "activations",
    "kv_cache",
    "communication",
    "inputs",
    "workspace",
)
"""A live storage is exactly one of these."""


def pattern(name: str) -> str:
    """`name` for all layers at once: `model.layers.*.mlp`."""
    return re.sub(r"(?<=[.\[])\d+(?=[.:\]])", "*", name)
