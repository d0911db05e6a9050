"""The data of the log: storages, their allocations and frees, and the operators that ran. Plain data."""

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
    """One allocation as tensors see it. `born`, `died` and `saved_at` (autograd saved it) are in nanoseconds."""

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
    base: bool = False  # it existed before the log began
    shown: bool = False  # as far as known no operator allocated it: a view, an owner or autograd showed it
    line: str = ""  # source line that allocated it, if the log records lines
    parts: dict[int, tuple[str, int]] | None = None  # parameters inside it, by offset: name, bytes

    @property
    def shares(self) -> list[tuple[str, int]]:
        """Name and bytes of each part: each parameter of a shared buffer, and the gaps between them."""
        parameters = [*self.parts.values()] if self.parts else []
        if len(parameters) < 2:
            return [(self.name, self.nbytes)]
        gap = self.nbytes - sum(nbytes for _, nbytes in parameters)
        return [*parameters, *([("between parameters", gap)] if gap else [])]

    def has(self, name: str, parameter: torch.Tensor) -> None:
        """Record that `parameter` lies in this storage, if its offset is not taken.

        A partition is a view of many parameters that the module has already named.
        """
        if self.parts is None:
            self.parts = {}
        offset = int(parameter.storage_offset())
        if (
            offset not in self.parts
            and sum(n for _, n in self.parts.values()) + parameter.nbytes <= self.nbytes
        ):
            self.parts[offset] = name, parameter.nbytes


class Event(NamedTuple):
    """`storage` grows by `delta` bytes at `time`. Where `storage` is None, a new phase begins."""

    time: int
    delta: int
    storage: Storage | None
    where: Where
    module: str
    saved: bool = False  # autograd saves it now, which changes no total

    @property
    def saves(self) -> int:
        """Change of the activation bytes that autograd keeps."""
        storage = self.storage
        if storage is None or storage.category != "activations":
            return 0
        if self.saved or (self.delta < 0 and storage.saved_at is not None):
            return self.delta or storage.nbytes
        return 0


class KernelMemory(NamedTuple):
    """Memory that a kernel takes and no operator returns, under a name.

    `moment` numbers what is alive together, from 0; None: it stays until the end. With `first` it is freed before the
    operator's results are allocated.
    """

    name: str
    nbytes: int
    moment: int | None = 0
    first: bool = False


class Operator(NamedTuple):
    """One dispatched operator, or an opaque region, that `began` at this time in nanoseconds."""

    began: int
    where: Where
    module: str
    name: str
    ended: int = 0  # of an opaque region, in nanoseconds
    leaves: str = ""  # of an opaque region: the category of the memory it leaves
    recomputed: bool = False
