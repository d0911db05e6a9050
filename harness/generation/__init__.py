"""The inference run: generate for prompts in static batches or with continuous batching, with a KV cache.

It may import every room below it, but not training. Start at `infer.py`, then `decode.py`, the loop of a static batch.
"""
