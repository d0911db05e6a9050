"""A run without its world: the same code on fake tensors, for ranks that do not exist.

It may import all that a run imports. Start at `all_ranks.py`, then `one_rank.py`; `shims.py` has what is replaced in
torch, transformers and DeepSpeed, each with its reason.
"""

from dataclasses import replace

from harness.config.settings import Settings

UNVERIFIED = "not verified on this hardware"
"""What a rehearsal for a GPU is until it has been held against a run on one."""


def decisive(settings: Settings) -> Settings:
    """`settings` with no more micro-batches than decide the peak of a step.

    With one more than there are stages each has kept all that it ever keeps, gradients among it; a pipeline's last
    stage keeps the loss of each further one, 4 bytes.
    """
    few = min(settings.train.accumulation, settings.pipeline.stages + 1)
    return replace(settings, train=replace(settings.train, accumulation=few, batch=None))
