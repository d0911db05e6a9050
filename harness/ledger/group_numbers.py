"""How many operations process groups were given that Python did not give them, by the groups' own numbers.

gloo numbers what it is asked for: `ProcessGroupGloo::getSequenceNumberForGroup` in torch/csrc/distributed/c10d. What
C++ asks for, as for DistributedDataParallel, DTensor, functional collectives and compiled graphs, shows in nothing else
that Python can read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

GLOO = "ProcessGroupGloo"
FAKE = "fake"
"""The backend of torch's own tests, which sends nothing."""


class GroupNumbers:
    """The numbers of all process groups, since `begin`."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # by group, of the newest operation that was seen
        self._others = 0

    def begin(self) -> None:
        """Count from now on."""
        self._last = {
            group.group_name: number for group in _groups() if (number := _number(group)) is not None
        }
        self._others = 0

    @contextmanager
    def by_python(self, group: Any) -> Iterator[None]:
        """What `group` is asked for inside this context is given by Python."""
        number = _number(group)
        if number is None:
            yield
            return
        self._see(group, number)
        try:
            yield
        finally:
            self._last[group.group_name] = _number(group) or number

    def others(self) -> int:
        """How many operations groups were given otherwise. One that is destroyed between two calls is not looked at."""
        for group in _groups():
            if (number := _number(group)) is not None:
                self._see(group, number)
        return self._others

    def without(self) -> list[str]:
        """The backends of the groups of several ranks that number nothing, or not all."""
        groups = (group for group in _groups() if group.size() > 1)
        backends = {dist.get_backend(group) for group in groups if not all(map(_is_gloo, _backends(group)))}
        return sorted(backends - {FAKE})

    def _see(self, group: Any, number: int) -> None:
        last = self._last.get(group.group_name, 0)
        self._others += number - last if number >= last else number  # a new group may have an old name
        self._last[group.group_name] = number


def _groups() -> list[Any]:
    return [*dist.distributed_c10d._world.pg_map] if dist.is_initialized() else []


def _number(group: Any) -> int | None:
    """The number of the last operation of `group`; None where it is not gloo's."""
    gloo: Any = next(filter(_is_gloo, _backends(group)), None)
    return None if gloo is None else int(gloo._get_sequence_number_for_group())


def _backends(group: Any) -> list[Any]:
    """The backends of `group`, which may have one for each kind of device."""
    return [group._get_backend(device) for device in group._device_types]


def _is_gloo(backend: Any) -> bool:
    return type(backend).__name__ == GLOO
