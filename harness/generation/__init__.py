"""The inference run: prompts continued in batches, or continuously, each from a KV cache.

It may import all that is below it, and no training. Start at `infer.py`, then `decode.py`, the loop of a batch.
"""
