"""The transformers model of a run: with loaded or random weights, cut into stages, split over ranks, with its KV cache.

It may import config, ledger, runtime, record and quantization. Start at `loader.py`. `stage.py` cuts a model into
stages, `kv_cache.py` has every kind of cache, `resolve.py` replaces `auto` in the settings and makes a run's `Plan`.
"""

from harness.runtime.imports import hush_torchao

hush_torchao()  # before anything here imports transformers
