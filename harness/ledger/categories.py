"""What a live storage can be. No torch here: records are read without it."""

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
