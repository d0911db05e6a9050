"""What the log writes down: storages, their births and deaths, and the operators that ran. Plain data."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Where(NamedTuple):
    """A place in the run: which step, which phase of it, which micro-batch."""

    step: int
    phase: str
    micro_batch: int


@dataclass(slots=True, eq=False)
class Storage:
    """One allocation as tensors see it. `born`, `died` and `saved_at` (autograd kept it) are nanoseconds."""

    nbytes: int
    pointer: int
    born: int
    where: Where
    module: str
    op: str
    category: str
    name: str = ""
    died: int | None = None
    saved_at: int | None = None
    recomputed: bool = False
    base: bool = False  # it was alive before the log began
    line: str = ""  # of the source that made it, where the log asks for lines
    parts: dict[int, tuple[str, int]] | None = None  # parameters that lie in it, by offset: name, bytes

    @property
    def shares(self) -> list[tuple[str, int]]:
        """Its bytes by name: of a buffer in which many parameters lie each one's, and what is left between them."""
        own = [*self.parts.values()] if self.parts else []
        if len(own) < 2:
            return [(self.name, self.nbytes)]
        left = self.nbytes - sum(nbytes for _, nbytes in own)
        return [*own, *([("between parameters", left)] if left else [])]

    def has(self, name: str, parameter: torch.Tensor) -> None:
        """`parameter` lies in it, unless the place is known: a partition is a view of many that the module named."""
        if self.parts is None:
            self.parts = {}
        offset = int(parameter.storage_offset())
        if (
            offset not in self.parts
            and sum(n for _, n in self.parts.values()) + parameter.nbytes <= self.nbytes
        ):
            self.parts[offset] = name, parameter.nbytes


class Event(NamedTuple):
    """A change of the live set: `delta` bytes of `storage` at `time`; or a new phase where `storage` is None."""

    time: int
    delta: int
    storage: Storage | None
    where: Where
    module: str
    saved: bool = False  # the moment autograd saved it, which changes no total

    @property
    def saves(self) -> int:
        """Bytes by which what autograd keeps of activations grows, or shrinks."""
        storage = self.storage
        if storage is None or storage.category != "activations":
            return 0
        if self.saved or (self.delta < 0 and storage.saved_at is not None):
            return self.delta or storage.nbytes
        return 0


class Operator(NamedTuple):
    """One dispatched operator, from `began` to `ended` in nanoseconds."""

    began: int
    ended: int
    where: Where
    module: str
    name: str
    leaves: str = ""  # of what is not seen inside: the category of what it makes and keeps
    recomputed: bool = False
