"""The log: every storage's birth and death, with where it happened. What a storage *was* is decided by later claims.

Known limits: a storage that no operator returned and no owner names is not seen here (the allocator's own
events show it as `kernel` or `unattributed`), and an operator that frees a storage behind Python's back
shows its death when the storage object goes.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import time_ns
from typing import Any, NamedTuple, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from harness.ledger.work import Counter

PRECEDENCE = ("parameters", "optimizer", "communication", "gathered", "kv_cache", "gradients", "inputs")
"""Where two owners name one storage, the earlier word wins: a gradient that is a view of a bucket is the bucket."""
RANK = {category: rank for rank, category in enumerate((*PRECEDENCE, "activations", "workspace"))}

MADE_IN = {
    "data": "inputs",
    **dict.fromkeys(("idle", "setup", "backward", "step", "checkpoint"), "workspace"),
}
"""What a storage is that nobody claims, by the phase that made it; any other phase is a forward's."""

COLLECTIVES = ("c10d", "_c10d_functional")
"""Namespaces of what ranks do together; the second gives new tensors back."""
POINT_TO_POINT = ("send", "recv_", "recv_any_source_", "wait_tensor")
"""What passes a tensor on from one rank to another, or waits for it: it stays what it is."""

PASSED_OVER = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
"""How the files' names begin whose lines nobody asks for; `<` is code that was made and has no file."""

_DEVICE = torch.ops.prim.device.default

Made = TypeVar("Made")


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


class _Death(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("key", "storage")
    key: int
    storage: Storage


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts; of one that is made of others, those."""
    if isinstance(tree, torch.Tensor):
        if hasattr(tree, "__tensor_flatten__"):
            for name in tree.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(tree, name))
        elif _wraps(type(tree)):
            yield from tensors_in([part for part in vars(tree).values() if isinstance(part, torch.Tensor)])
        else:
            yield tree
        return
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ():
        if isinstance(item, (torch.Tensor, tuple, list, dict)):
            yield from tensors_in(item)


@cache
def _wraps(kind: type[torch.Tensor]) -> bool:
    """Whether a tensor of this class is made of others, and does not say of which: it has no memory itself."""
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not issubclass(kind, FakeTensor)


def shared(types: Iterable[type]) -> bool:
    """Whether among these kinds of tensors is DTensor, which is this rank's part and the word of how ranks share it.

    A mode that leaves an operator on such to them is shown what they do with the parts.
    """
    return any(issubclass(kind, DTensor) for kind in types)


def device_of(tensor: torch.Tensor) -> str:
    """Where `tensor` is: the kind of device; of a fake one its whole name, asked for without an operator."""
    fake = getattr(tensor, "fake_device", None)
    return tensor.device.type if fake is None else str(fake)


def calling_line() -> str:
    """`file:line` of the innermost caller that is neither torch's nor the ledger's; nothing where there is none."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PASSED_OVER):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


class Log(TorchDispatchMode):
    """A dispatch mode that logs storages. It holds no tensor and changes none."""

    def __init__(self, device: str = "cpu", block: int = 1, lines: bool = False) -> None:
        super().__init__()
        self.device, self.block, self.lines = device, block, lines
        self.where = Where(0, "idle", 0)
        self.work = Counter(device_of, device, self.where)
        self.module = ""
        self.recomputing = False
        self.follow: Callable[[], None] | None = None  # called before each operator
        self.settle: Callable[[Any], None] | None = None  # called after each collective, with its arguments
        self.events: list[Event] = []
        self.operators: list[Operator] = []
        self._alive: dict[int, _Death] = {}
        self._recording = False
        self._aside = False

    def __enter__(self) -> "Log":
        self._recording = True
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._recording = False

    @contextmanager
    def blind(self) -> Iterator[None]:
        """Within it operators are not seen, and what ends is still told."""
        with _disable_current_modes():
            yield

    def aside(self, call: Callable[[], Made]) -> Made:
        """What `call` makes by operators that are the ledger's own, and no part of the run."""
        self._aside = True
        try:
            return call()
        finally:
            self._aside = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be wrapped against tracing: the wrapper costs as much as the log, and only a compiler needs it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and shared(types):
            return NotImplemented
        if self._aside:
            return func(*args, **kwargs) if kwargs else func(*args)
        if func is _DEVICE and (fake := getattr(args[0], "fake_device", None)) is not None:
            return fake
        if func.namespace == "prim":  # a tensor is asked what it is
            return func(*args)
        if self.follow is not None:
            self.follow()
        began = time_ns()
        out = func(*args, **kwargs) if kwargs else func(*args)
        together = func.namespace in COLLECTIVES
        collective = together and func.__name__.partition(".")[0] not in POINT_TO_POINT
        if collective and self.settle is not None:
            self.settle(args)
        ended = time_ns()
        self.operators.append(Operator(began, ended, self.where, self.module, func.__name__))
        self.work.count(func, args, kwargs, out)
        if type(out) is torch.Tensor:
            self.see(out, func.__name__, ended)
        elif out is not None:
            for tensor in tensors_in(out):
                self.see(tensor, func.__name__, ended)
        if collective:
            self._communicated((args, out), func.__name__, ended)
        return out

    def _communicated(self, given: Any, op: str, now: int) -> None:
        """What a collective sent, filled or made, and no owner names, is a bucket of its caller's."""
        for tensor in tensors_in(given):
            record = self.see(tensor, op, now)
            if record is not None and not record.name:
                record.category = "communication"

    def see(self, tensor: torch.Tensor, op: str, now: int) -> Storage | None:
        """The record of `tensor`'s storage, made now if it was not known. None where it has none on this device."""
        if device_of(tensor) != self.device:
            return None
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse and other layouts without one storage
            return None
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            record = known.storage
            if self._size(storage) != record.nbytes:  # resized in place: one block goes, another comes
                self._end(record, now)
                return self._begin(storage, key, op, now)
            return record
        return self._begin(storage, key, op, now)

    def _begin(self, storage: torch.UntypedStorage, key: int, op: str, now: int) -> Storage:
        where, module = self.where, self.module
        fake = storage.device.type == "meta"
        record = Storage(
            self._size(storage),
            0 if fake else storage.data_ptr(),
            now,
            where,
            module,
            op,
            self.makes,
            recomputed=self.recomputing,
        )
        if self.lines and op:  # what is only seen now was made elsewhere
            record.line = calling_line()
        death = _Death(storage, self._gone)
        death.key, death.storage = key, record
        self._alive[key] = death
        if record.nbytes:
            self.events.append(Event(now, record.nbytes, record, where, module))
        return record

    @property
    def makes(self) -> str:
        """What a storage is that is made now, and that nobody will claim."""
        return "activations" if self.recomputing else MADE_IN.get(self.where.phase, "activations")

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self.block) * self.block

    def _gone(self, death: _Death) -> None:
        if self._alive.get(death.key) is death:
            del self._alive[death.key]
        self._end(death.storage, time_ns())

    def _end(self, record: Storage, now: int) -> None:
        if self._recording and record.died is None:
            record.died = now
            if record.nbytes:
                self.events.append(Event(now, -record.nbytes, record, self.where, self.module))

    def enter(self, where: Where) -> None:
        """From here on, what happens happens in `where`."""
        self.where = where
        self.work.enter(where)
        self.events.append(Event(time_ns(), 0, None, where, self.module))

    def save(self, tensor: torch.Tensor) -> None:
        """Autograd keeps `tensor` for backward."""
        for part in tensors_in(tensor):
            record = self.see(part, "saved", time_ns())
            if record is not None and record.saved_at is None:
                record.saved_at = time_ns()
                self.events.append(Event(record.saved_at, 0, record, self.where, self.module, saved=True))

    def claim(self, category: str, name: str, tensor: torch.Tensor, base: bool = False) -> None:
        """`tensor`'s storage is `category`, for its whole life. `base`: it was there before the log began."""
        for part in tensors_in(tensor):
            record = self.see(part, "", time_ns())
            if record is None:
                continue
            record.base = record.base or (base and not record.op)
            if category == "parameters" and part.nbytes < record.nbytes:
                record.has(name, part)
            if not record.name or RANK[category] < RANK[record.category]:
                record.category, record.name = category, name
