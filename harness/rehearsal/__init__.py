"""Rehearsals: the run's own code on fake tensors, for ranks and for GPUs that do not exist.

It may import all that a run imports. Start at `all_ranks.py`, then `one_rank.py`; `course.py` says which steps and
tokens are computed. `program.py` rehearses anybody's program; `card.py` says what a GPU that is not there is, and
`card_*.py` and `cuda_*.py` have its parts. `shims.py` lists what a rehearsal replaces in torch, transformers and
DeepSpeed, each with its reason, and `every_patch.py` what all rooms replace.
"""

from dataclasses import replace

from harness.config.settings import Settings

UNVERIFIED = "not verified on this hardware"
"""The status of a rehearsal for a GPU that has not been compared with a real run on such a GPU."""


def decisive(settings: Settings) -> Settings:
    """`settings` with only as many micro-batches, of a step and of a validation, as decide the peak.

    After stages + 1 micro-batches, every stage has kept the most that it ever keeps, gradients included; a validation
    keeps the batch before while it takes the next. Each further one adds only its loss on a pipeline's last stage, 4
    bytes.
    """
    train, most = settings.train, settings.pipeline.stages + 1
    few = replace(
        train,
        accumulation=min(train.accumulation, most),
        batch=None,
        validation_batches=min(train.validation_batches, most),
    )
    return replace(settings, train=few)
