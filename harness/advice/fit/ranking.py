"""The configs that fit, the cheapest first."""

from collections.abc import Callable, Sequence

from harness.advice.fit.combination import Combination, Trial
from harness.analysis.moves import transfers
from harness.analysis.moves.links_model import Flow, flow
from harness.config.settings import NEW_TOKENS, Settings
from harness.record.links import NETWORK, STORAGE
from harness.record.memory import Transfer
from harness.rehearsal import decisive

RECOMPUTED = ("none", "selective", "full")
"""The modes of checkpointing: each recomputes more than the one before, and keeps less."""

OFFLOADED = ("none", "optimizer", "all")
"""The values of zero.offload: each moves more to the host than the one before."""

BY = {
    "train": "ranked by what a rank sends for each sequence, as it was counted: between nodes first, then within a "
    "node; those that recompute after those, offloaded ones last",
    "infer": "ranked by the tokens in memory at once, batch x (prompt + new)",
}
BY_FORMULA = (
    "ranked by what a rank sends for each sequence by formula (arXiv 1910.02054, section 7), for it was not counted; "
    "those that recompute after those, offloaded ones last"
)

Preference = tuple[int, ...]
"""For each axis the place of a config's value in its list."""

Sent = tuple[float, float]
"""Bytes that a rank sends for each sequence, between nodes and within its own."""


def basis(trials: Sequence[Trial], mode: str) -> str:
    """By what `ranked` has put `trials` in order."""
    return BY[mode] if mode != "train" or all(map(sent, trials)) else BY_FORMULA


def ranked(
    combinations: Sequence[Combination], preference: Callable[[Sequence[str]], Preference]
) -> list[Trial]:
    """The largest config that fits of each combination, the cheapest first; among equals by the user's `preference`."""
    largest = [trial for each in combinations if (trial := each.largest)]
    counted = all(map(sent, largest))

    def order(trial: Trial) -> tuple[float, ...]:
        return *cost(trial.settings, sent(trial) if counted else None), *preference(trial.overrides)

    return sorted(largest, key=order)


def sent(trial: Trial) -> Sent | None:
    """What the rank sends that sends most, as its rehearsal counted it. None: it was not counted.

    A rehearsal leaves out micro-batches that decide no peak; each moves what the first of a step does.
    """
    traffic = trial.worst.traffic
    if trial.settings.mode != "train" or not trial.rehearsed or not traffic or None in traffic:
        return None
    by_rank = [_sent(rows or (), trial.settings) for rows in traffic]
    return None if None in by_rank else max(each for each in by_rank if each)


def _sent(traffic: Sequence[Transfer], settings: Settings) -> Sent | None:
    rows = transfers.of_last(traffic, "train", [each.step for each in traffic])
    train = settings.train
    left_out = train.accumulation - decisive(settings).train.accumulation
    again = [each for each in rows if each.micro_batch == 0 and each.phase != "step"]
    between = [flow(each for each in some if each.link == NETWORK) for some in (rows, again)]
    within = [flow(each for each in some if each.link not in (NETWORK, STORAGE)) for some in (rows, again)]

    def each_sequence(flows: Sequence[Flow | None]) -> float | None:
        whole, more = flows
        if whole is None or more is None:
            return None
        return (whole.busier + left_out * more.busier) / (train.micro_batch * train.accumulation)

    far, near = each_sequence(between), each_sequence(within)
    return None if far is None or near is None else (far, near)


def cost(settings: Settings, sent: Sent | None = None) -> tuple[float, ...]:
    """The sort key of a config, the cheapest first.

    In inference it is the number of tokens in memory at once, the most first. In training it is, in this order:
    the offload of the state to the host and of the activations, the recomputation, the share of a step that stages wait
    for each other, what a rank sends, and ZeRO's stage. `sent` is what was counted. Without it, it is elements by
    formula, per parameter of the rank's stage and per sequence: 2 a step under ZeRO-0 and 1, 1 a step and 1 a
    micro-batch under ZeRO-2, 3 a micro-batch under ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).
    """
    if settings.mode == "infer":
        generation = settings.generation
        new = generation.max_new_tokens or NEW_TOKENS
        return (-(generation.prompt_length + new) * generation.batch,)
    zero, train = settings.zero, settings.train
    offload = OFFLOADED.index(zero.offload)
    recompute = RECOMPUTED.index(settings.checkpointing.mode)
    stages = settings.pipeline.stages
    waits = (stages - 1) / (train.accumulation + stages - 1)
    waiting = settings.checkpointing.offload == "cpu"
    return offload, waiting, recompute, waits, *(sent or (_by_formula(settings),)), zero.stage


def of_any_batch(settings: Settings) -> tuple[float, ...]:
    """The first parts of `cost`, which the searched key does not change: none in inference."""
    return cost(settings)[:3] if settings.mode == "train" else ()


def _by_formula(settings: Settings) -> float:
    train, stages = settings.train, settings.pipeline.stages
    elements = {0: 2.0, 1: 2.0, 2: 1.0 + train.accumulation, 3: 3.0 * train.accumulation}[settings.zero.stage]
    return elements / (train.micro_batch * train.accumulation * stages)
