"""How many operations process groups were given that Python did not give them, by the groups' own numbers.

gloo and NCCL number what they are asked for: `ProcessGroup::getSequenceNumberForGroup` in torch/csrc/distributed/c10d.
What C++ asks for, as for DistributedDataParallel, DTensor, functional collectives and compiled graphs, shows in nothing
else that Python can read.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

NOT_EACH = "nccl"
"""A backend that does not number each operation of a coalesced one."""


class GroupNumbers:
    """The numbers of all process groups, since `begin`."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}
        self._by_python: Counter[str] = Counter()

    def begin(self) -> None:
        """Count from now on."""
        self._first = dict(_numbers())
        self._by_python.clear()

    @contextmanager
    def by_python(self, group: Any) -> Iterator[None]:
        """What `group` is asked for inside this context is given by Python."""
        before = _number(group)
        yield
        if before is not None:
            self._by_python[group.group_name] += (_number(group) or before) - before

    def others(self) -> int:
        """How many operations the groups that are there now were given otherwise."""
        since = ((name, number - self._first.get(name, 0)) for name, number in _numbers())
        return sum(max(0, number - self._by_python[name]) for name, number in since)


def _numbers() -> Iterator[tuple[str, int]]:
    if not dist.is_initialized():
        return
    for group, (backend, _) in [*dist.distributed_c10d._world.pg_map.items()]:
        number = _number(group) if NOT_EACH not in backend else None
        if number is not None:
            yield group.group_name, number


def _number(group: Any) -> int | None:
    """The number of `group`'s last operation; None where it has none."""
    try:
        return int(group._get_sequence_number_for_group())
    except (RuntimeError, AttributeError):
        return None
