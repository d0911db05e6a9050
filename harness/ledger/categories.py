"""The categories of a live storage, and its name pattern. No torch here: records are read without torch."""

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
"""Each live storage is in exactly one category."""

KERNEL = "kernel"
"""Beside them: memory that kernels take and no operator returns, known from an allocator or from rules for a GPU."""

CLASSES = (
    "matmul",
    "flash attention",
    "cuDNN attention",
    "other attention",
    "normalization",
    "loss",
    "lookup",
    "optimizer",
    "elementwise",
)
"""The classes of operators by which work is counted. What is in no other is "elementwise".

"matmul" has convolutions too, "loss" softmax and cross-entropy, "lookup" what picks rows of a table or adds to them,
"optimizer" whole updates in one operator.
"""


def pattern(name: str) -> str:
    """`name` with every layer number replaced by `*`: `model.layers.*.mlp`."""
    return re.sub(r"(?<=[.\[])\d+(?=[.:\]])", "*", name)
