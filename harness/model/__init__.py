"""A transformers model as a run has it: loaded or random, cut into stages, shared among ranks, with its KV cache.

It may import config, ledger, runtime and quantization. Start at `loader.py`; `stage.py` is the model in parts,
`kv_cache.py` has every kind of cache, `resolve.py` decides what is `auto`.
"""
