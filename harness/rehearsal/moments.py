"""The highest moment of each phase of a rehearsal, and what it comes to with another batch or more layers.

What is alive at one moment has a part in proportion to the batch and a part that does not depend on it, and each layer
of a kind adds the same. So a moment is on a line over either; a peak, the highest of several, is not.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from harness.config.settings import Settings
from harness.record.memory import Rank

SURE = 0.9
"""The part of the activations that surely grows with the batch: a mask or the positions may be there once for all."""

WITH_BATCH = ("forward", "backward", "prefill", "decode")
"""The phases whose workspace is of a batch, and not the optimizer's or the set-up's."""

SATURATES = "gathered"
"""The category that does not grow with the layers: DeepSpeed gathers no more than stage3_max_live_parameters."""

ALIKE = 1.01
"""Estimates of which the highest is less than so many times the lowest are alike."""


class Moment(NamedTuple):
    """The bytes by category where a phase has the most."""

    phase: tuple[int, str, int]
    """Step, phase, micro-batch."""
    categories: dict[str, int]


def moments_of(rank: Rank) -> tuple[Moment, ...]:
    """The highest moment of each phase that was measured."""
    return tuple(
        Moment((each.step, each.phase, each.micro_batch), {k: v for k, v in each.categories.items() if v})
        for each in rank.phases
        if each.peak is not None
    )


def estimate(moments: Sequence[Moment], batch: int, other: int) -> dict[str, int]:
    """The peak by category, in bytes, estimated for the batch `other` from the moments with `batch`."""
    return _highest(_scaled(each, _of_batch(each.phase[1]), other / batch) for each in moments)


def at_least(moments: Sequence[Moment], settings: Settings, batch: int, other: int) -> dict[str, int]:
    """Bytes by category that the peak surely has with the batch `other`, which is larger than `batch`.

    Each moment with `batch` comes again with `other`, where its activations and its KV cache are larger in proportion.
    Not sure are the activations of a generation, where prompts may go through in pieces, and a cache of `pages`.
    """
    sure: tuple[str, ...] = ("activations",) if settings.mode == "train" else ("kv_cache",)
    if settings.mode == "infer" and settings.generation.cache == "paged":
        sure = ()
    return _highest(_scaled(each, sure, 1 + SURE * (other / batch - 1)) for each in moments)


def at_depth(of_depth: Mapping[int, Sequence[Moment]], layers: int) -> tuple[Moment, ...]:
    """The moments with `layers`, estimated from those of two or three models with fewer.

    Where the estimates differ, because a phase has another highest moment in the deeper model, or a buffer is full from
    some depth on, most are too high: so it is the lower median of all.
    """
    estimates = sorted(_estimates(of_depth, layers), key=_total)
    return estimates[(len(estimates) - 1) // 2]


def agree(of_depth: Mapping[int, Sequence[Moment]], layers: int) -> bool:
    """Whether the estimates of `at_depth` are all alike."""
    totals = [*map(_total, _estimates(of_depth, layers))]
    return max(totals) <= ALIKE * min(totals)


def _estimates(of_depth: Mapping[int, Sequence[Moment]], layers: int) -> Iterator[tuple[Moment, ...]]:
    """From each two models that follow one another two estimates: category by category, and of the sum."""
    for few, more in pairwise(sorted(of_depth)):
        smaller = {each.phase: each.categories for each in of_depth[few]}
        distance = (layers - few) / (more - few)
        for by_sum in (False, True):
            yield tuple(_deeper(smaller, each, distance, by_sum) for each in of_depth[more])


def _total(moments: Iterable[Moment]) -> int:
    return sum(_highest(each.categories for each in moments).values())


def _deeper(
    smaller: Mapping[tuple[int, str, int], dict[str, int]], moment: Moment, distance: float, by_sum: bool
) -> Moment:
    """`moment` in a model whose depth lies on so many times the `distance` from that with `smaller` to its own."""
    less = smaller.get(moment.phase, {})
    categories = {
        name: count if name == SATURATES else _on_line(less.get(name, 0), count, distance)
        for name, count in moment.categories.items()
    }
    if by_sum and (most := sum(categories.values())):
        whole = _on_line(sum(less.values()), sum(moment.categories.values()), distance)
        categories = _scaled(Moment(moment.phase, categories), categories, whole / most)
    return Moment(moment.phase, categories)


def _on_line(first: int, second: int, distance: float) -> int:
    return max(0, int(first + (second - first) * distance))


def _of_batch(phase: str) -> tuple[str, ...]:
    """The categories that grow with the batch, in proportion or nearly."""
    return ("activations", "inputs", "kv_cache", *["workspace"] * (phase in WITH_BATCH))


def _scaled(moment: Moment, names: Container[str], times: float) -> dict[str, int]:
    return {name: int(count * times) if name in names else count for name, count in moment.categories.items()}


def _highest(peaks: Iterable[dict[str, int]]) -> dict[str, int]:
    return max(peaks, key=lambda categories: sum(categories.values()), default={})
