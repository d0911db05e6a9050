"""A run without its world: the same code on fake tensors, for ranks that do not exist."""
