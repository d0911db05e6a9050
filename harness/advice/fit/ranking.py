"""The configs that fit, the cheapest first."""

from collections.abc import Sequence

from harness.advice.fit.combination import Combination, Trial
from harness.config.settings import NEW_TOKENS, Settings

RECOMPUTED = ("none", "selective", "full")
"""The modes of checkpointing: each recomputes more than the one before, and keeps less."""

OFFLOADED = ("none", "optimizer", "all")
"""The values of zero.offload: each moves more to the host than the one before."""

BY = {
    "train": "ranked by what a rank sends for each sequence (arXiv 1910.02054, section 7); "
    "those that recompute after those, offloaded ones last",
    "infer": "ranked by the tokens in memory at once, batch x (prompt + new)",
}


def ranked(combinations: Sequence[Combination]) -> list[Trial]:
    """The largest config that fits of each combination, the cheapest first."""
    largest = [each.largest for each in combinations]
    return sorted((trial for trial in largest if trial), key=lambda trial: cost(trial.settings))


def cost(settings: Settings) -> tuple[float, ...]:
    """The sort key of a config, the cheapest first.

    In inference it is the number of tokens in memory at once, the most first. In training it is, in this order:
    the offload to the host, the recomputation, the share of a step that stages wait for each other, the elements that
    a rank sends, and ZeRO's stage. The elements are per parameter of the rank's stage and per sequence: 2 a step under
    ZeRO-0 and 1, 1 a step and 1 a micro-batch under ZeRO-2, 3 a micro-batch under ZeRO-3 (Rajbhandari et al. 2020,
    arXiv 1910.02054, section 7).
    """
    if settings.mode == "infer":
        generation = settings.generation
        new = generation.max_new_tokens or NEW_TOKENS
        return (-(generation.prompt_length + new) * generation.batch,)
    zero, train = settings.zero, settings.train
    sent = {0: 2.0, 1: 2.0, 2: 1.0 + train.accumulation, 3: 3.0 * train.accumulation}[zero.stage]
    offload = OFFLOADED.index(zero.offload)
    recompute = RECOMPUTED.index(settings.checkpointing.mode)
    stages = settings.pipeline.stages
    waits = (stages - 1) / (train.accumulation + stages - 1)
    return offload, recompute, waits, sent / (train.micro_batch * train.accumulation * stages), zero.stage
