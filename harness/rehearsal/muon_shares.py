"""What each rank has of Muon's work under ZeRO-3: in DeepSpeed (0.19) ranks take its matrices in turn."""

from collections.abc import Iterator
from math import ceil, prod
from typing import NamedTuple

import torch

from harness.model import adapter
from harness.model.plan import Plan
from harness.training.optimizers import matrices

SUB_GROUP = 1_000_000_000
"""DeepSpeed's own `sub_group_size`: elements of a rank's shards that are updated together."""

Shape = tuple[int, ...]


class Share(NamedTuple):
    """The shape of the matrix that a rank orthogonalizes in each turn, None for none, and the number that it pads."""

    turns: tuple[Shape | None, ...]
    padded: tuple[int, ...]

    @property
    def matrices(self) -> int:
        """How many it orthogonalizes."""
        return len(self.turns) - self.turns.count(None)


def shares(plan: Plan) -> list[Share]:
    """The share of each rank; ranks with equal ones have equal bytes."""
    settings, ranks = plan.settings, plan.layout.dp_size
    model = adapter.outline(settings, plan.config, torch.bfloat16)
    shapes = [tuple(parameter.shape) for parameter in matrices(model)]
    options = settings.deepspeed.options.get("zero_optimization", {})
    groups = _sub_groups(shapes, ranks, options.get("sub_group_size", SUB_GROUP))
    buckets = [bucket for group in groups for bucket in _buckets(group, settings.zero.reduce_bucket_size)]
    return [
        Share(
            tuple(
                bucket[first + rank] if first + rank < len(bucket) else None
                for bucket in buckets
                for first in range(0, len(bucket), ranks)
            ),
            # a shard that is not all of the matrix
            tuple(max(0, (rank + 1) * ceil(prod(shape) / ranks) - prod(shape)) for shape in shapes),
        )
        for rank in range(ranks)
    ]


def _sub_groups(shapes: list[Shape], ranks: int, size: int) -> Iterator[list[Shape]]:
    """`DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups`: a group ends with the shard that fills it."""
    group: list[Shape] = []
    for shape in shapes:
        group.append(shape)
        if sum(ceil(prod(each) / ranks) for each in group) >= size:
            yield group
            group = []
    if group:
        yield group


def _buckets(group: list[Shape], size: int) -> Iterator[list[Shape]]:
    """`_apply_muon_to_accumulated_grads`: as many whole gradients as have `size` elements, and at least one."""
    bucket: list[Shape] = []
    for shape in group:
        if bucket and sum(map(prod, bucket)) + prod(shape) > size:
            yield bucket
            bucket = []
        bucket.append(shape)
    if bucket:
        yield bucket
