"""The transformers model of a run: with loaded or random weights, cut into stages, split over ranks, with its KV cache.

It may import config, ledger, runtime, record and quantization. Start at `loader.py`. `stage.py` cuts a model into
stages, `kv_cache.py` has every kind of cache, `resolve.py` replaces `auto` in the settings and makes a run's `Plan`.
"""

import logging

# transformers imports torchao where that is installed, which then warns of kernels that nothing here uses
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
