"""A run without its world: the same code on fake tensors, for ranks that do not exist."""

UNVERIFIED = "not verified on this hardware"
"""What a rehearsal for a GPU is until it has been held against a run on one."""
