"""The log: every storage's birth and death, with where it happened. What a storage *was* is decided by later claims.

Known limits: a storage that no operator returned and no owner names is not seen here (the allocator's own
events show it as `kernel` or `unattributed`), and an operator that frees a storage behind Python's back
shows its death when the storage object goes. Operators of other threads are not seen, nor are those that a compiler
has made one program of (`compiled.py`).
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import time_ns
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from harness.ledger.events import Event, Operator, Storage, Where
from harness.ledger.lines import calling_line
from harness.ledger.tensors import (
    parts_of,
    places,
    sizes_of,
    stands_for_others,
    storage_of,
    tensors_in,
    unnoticed,
)
from harness.ledger.unseen import Figures, Unseen
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

UNMADE = ("", "saved")
"""Not operators, but ways in which the log first meets a storage that was there: it is named, or autograd keeps it."""

_DEVICE = torch.ops.prim.device.default
_FAKE, _FUNCTIONAL, _PROXY = (
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "FUNCTIONAL", "PROXY")
)
_mode: Any = torch._C._get_dispatch_mode
_function_modes: Any = torch._C._len_torch_function_stack

Made = TypeVar("Made")


class _Death(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("key", "storage")
    key: int
    storage: Storage


class Log(TorchDispatchMode):
    """A dispatch mode that logs storages. It holds no tensor and changes none."""

    supports_higher_order_operators = True

    def __init__(
        self, device: str = "cpu", block: int = 1, lines: bool = False, unseen: Unseen | None = None
    ) -> None:
        super().__init__()
        self.device, self.block, self.lines = device, block, lines
        self.unseen = unseen or Unseen()
        self.where = Where(0, "idle", 0)
        self._there = places(device, False)
        self.work = Counter(self._there, self.where)
        self.module = ""
        self.recomputing = False
        self.follow: Callable[[], None] | None = None  # called before each operator
        self.settle: Callable[[Any], None] | None = None  # called after each collective, with its arguments
        self.events: list[Event] = []
        self.operators: list[Operator] = []
        self.recording = False
        self.fakes = False  # whether fake tensors are what it counts
        self.began = 0  # in nanoseconds
        self._alive: dict[int, _Death] = {}
        self._wraps: dict[type, bool] = {}
        self._aside = False
        self._above: list[TorchDispatchMode] | None = None  # while it is hidden, the modes that go before it
        self._thread = 0

    def __enter__(self) -> "Log":
        self.recording, self.began, self._thread = True, time_ns(), threading.get_ident()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.recording = False
        modes = _get_current_dispatch_mode_stack()
        if self in modes and modes[-1] is not self:
            self.hide()  # modes of the program's that were entered later go on
        if self._above is not None:
            self._above = None
            _push_mode(self)
        elif self not in modes:  # a generator that another thread closes
            return
        super().__exit__(*exc)

    def restart(self) -> None:
        """Begin with an empty page."""
        self.where, self.module, self.recomputing = Where(0, "idle", 0), "", False
        self.work = Counter(self._there, self.where)
        self.events, self.operators, self._alive = [], [], {}
        self._aside, self._above = False, None

    def look(self) -> None:
        """Decide what there is to count: where a FakeTensorMode is on, what it makes; else what holds memory."""
        self.fakes = any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
        self._there = self.work.there = places(self.device, self.fakes)

    def here(self) -> bool:
        """Whether this thread is one that the log sees: its own, or one that autograd lent its modes to.

        Where a compiler traces it as part of a program, it does so in another thread, and what asks is to do nothing.
        """
        if torch.compiler.is_compiling() or not self.recording:
            return False
        if threading.get_ident() == self._thread or self in _get_current_dispatch_mode_stack():
            return True
        self.unseen.note(*another_thread())
        return False

    def traced(self) -> bool:
        """Whether the program is only tried out now, by somebody who wants a graph of it."""
        graph = _mode(_PROXY) is not None or _mode(_FUNCTIONAL) is not None
        return graph or (not self.fakes and _mode(_FAKE) is not None)

    @property
    def hidden(self) -> bool:
        """Whether no operator is seen now."""
        return self._above is not None

    def sleep(self) -> None:
        """See nothing any more: this is a forked child, and nobody will ask."""
        self._aside, self.recording = True, False

    def hide(self) -> None:
        """Until `show`, no operator is seen. What ends is."""
        self._above = []
        while (mode := _pop_mode()) is not self:
            self._above.append(mode)
        for mode in reversed(self._above):
            _push_mode(mode)

    def show(self) -> None:
        """End what `hide` began."""
        if self._above is None:  # it was closed meanwhile
            return
        above, self._above = self._above, None
        for _ in above:
            _pop_mode()
        for mode in (self, *reversed(above)):
            _push_mode(mode)

    @contextmanager
    def opaque(self, name: str) -> Iterator[None]:
        """Within it nothing is seen but the allocator's events: to the log it is one operator."""
        began, hidden = time_ns(), self._above is not None
        if not hidden:
            self.hide()
        try:
            yield
        finally:
            if not hidden:
                self.show()
            self.operators.append(
                Operator(began, time_ns(), self.where, self.module, name, self.makes, self.recomputing)
            )

    def aside(self, call: Callable[[], Made]) -> Made:
        """What `call` makes by operators that are the ledger's own, and no part of the run."""
        before, self._aside = self._aside, True
        try:
            return call()
        finally:
            self._aside = before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be wrapped against tracing: the wrapper costs as much as the log, and only a compiler needs it."""
        return False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """To a compiler it is not there: what is compiled without the log is compiled with it."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Likewise."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types:
            if self.traced():
                return func(*args, **kwargs) if kwargs else func(*args)
            for kind in types:
                if self._wraps[kind] if kind in self._wraps else self._wrapping(kind, args, kwargs):
                    return NotImplemented  # it is shown what they do with what they wrap
        if self._aside:
            return func(*args, **kwargs) if kwargs else func(*args)
        if func is _DEVICE and (fake := getattr(args[0], "fake_device", None)) is not None:
            return fake
        space = func.namespace
        if space == "prim":  # a tensor is asked what it is
            return func(*args)
        if self.follow is not None:
            self.follow()
        began = time_ns()
        out = func(*args, **kwargs) if kwargs else func(*args)
        together = space in COLLECTIVES
        collective = together and func.__name__.partition(".")[0] not in POINT_TO_POINT
        if collective and self.settle is not None:
            self.settle(args)
        write = self._write if not _function_modes() else unnoticed(self._write)
        try:
            write(func, args, kwargs, out, began, collective)
        except Exception as error:  # a tensor of a kind that nobody thought of is no reason to stop a run
            self.missed(func.__name__, error)
        return out

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any, began: int, collective: bool) -> None:
        """`func` has made `out` of these."""
        name, ended = func.__name__, time_ns()
        self.operators.append(Operator(began, ended, self.where, self.module, name))
        self.work.count(func, args, kwargs, out)
        if type(out) is torch.Tensor:
            self.see(out, name, ended)
        elif out is not None:
            for tensor in tensors_in(out):
                self.see(tensor, name, ended)
        if collective:
            self._communicated((args, out), name, ended)

    def _wrapping(self, kind: type, args: Any, kwargs: Any) -> bool:
        self._wraps[kind] = unnoticed(stands_for_others)(kind, (args, kwargs))
        return self._wraps[kind]

    def missed(self, name: str, error: Exception, figures: Figures = "storages") -> None:
        """The ledger itself failed at `name`; the program goes on."""
        told = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        of = "" if figures == "all" else f" of {figures}"
        self.unseen.note(
            name,
            figures,
            f"{name} is not in the figures{of}: the ledger could not read it ({told})",
        )

    def _communicated(self, given: Any, op: str, now: int) -> None:
        """What a collective sent, filled or made, and no owner names, is a bucket of its caller's."""
        for tensor in tensors_in(given):
            record = self.see(tensor, op, now)
            if record is not None and not record.name:
                record.category = "communication"

    def see(self, tensor: torch.Tensor, op: str, now: int) -> Storage | None:
        """The record of `tensor`'s storage, made now if it was not known. None where it has none on this device."""
        if not self._there(tensor):
            return None
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, ValueError):  # it has none
            self._see_parts(tensor, op, now)
            return None
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            record = known.storage
            if self._size(storage) != record.nbytes:  # resized in place: one block goes, another comes
                self._end(record, now)
                return self._begin(storage, key, op, now)
            return record
        if tensor.is_nested:
            for sizes in self.aside(lambda: sizes_of(tensor)):
                self.see(sizes, op, now)
        return self._begin(storage, key, op, now)

    def _see_parts(self, tensor: torch.Tensor, op: str, now: int) -> None:
        parts = self.aside(lambda: parts_of(tensor))
        for part in parts:
            self.see(part, op, now)
        if not parts and op and not is_lazy(tensor):
            layout = f"tensors of layout {tensor.layout}"
            self.unseen.note(
                layout, "storages", f"{layout} have no storage: their memory is unattributed, or in no figure"
            )

    def _begin(self, storage: torch.UntypedStorage, key: int, op: str, now: int) -> Storage | None:
        where, module = self.where, self.module
        try:
            pointer = 0 if storage.device.type == "meta" else storage.data_ptr()
        except RuntimeError:  # it stands for memory that is not there
            return None
        record = Storage(
            self._size(storage),
            pointer,
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
        if self.recording and record.died is None:
            record.died = now
            if record.nbytes:
                self.events.append(Event(now, -record.nbytes, record, self.where, self.module))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """`storage` may have another size, which no operator gave it."""
        known = self._alive.get(storage._cdata)
        if known is not None and self._size(storage) != known.storage.nbytes:
            self._end(known.storage, time_ns())
            again = self._begin(storage, known.key, "resize_", time_ns())
            if again is not None:  # it is whose it was
                again.category, again.name, again.parts = (
                    known.storage.category,
                    known.storage.name,
                    known.storage.parts,
                )

    def enter(self, where: Where) -> None:
        """From here on, what happens happens in `where`."""
        self.where = where
        self.work.enter(where)
        self.events.append(Event(time_ns(), 0, None, where, self.module))

    def save(self, tensors: Any) -> None:
        """Autograd keeps what is in `tensors` for backward."""
        for part in (tensors,) if type(tensors) is torch.Tensor else tensors_in(tensors):
            for _, record in self._records(part, "saved"):
                if record.saved_at is None:
                    record.saved_at = time_ns()
                    saved = Event(record.saved_at, 0, record, self.where, self.module, saved=True)
                    self.events.append(saved)

    def claim(self, category: str, name: str, tensor: torch.Tensor, base: bool = False) -> None:
        """`tensor`'s storage is `category`, for its whole life. `base`: it was there before the log began."""
        for each in tensors_in(tensor):
            for part, record in self._records(each, ""):
                if base and not record.base and not self._made(record):
                    record.base = not self.recording or _own_memory(part)
                if category == "parameters" and part.nbytes < record.nbytes:
                    record.has(name, part)
                if not record.name or RANK[category] < RANK[record.category]:
                    record.category, record.name = category, name

    def _records(self, tensor: torch.Tensor, op: str) -> Sequence[tuple[torch.Tensor, Storage]]:
        """`tensor` with its storage's record; of one that has none, its parts with theirs."""
        record = self.see(tensor, op, time_ns())
        if record is not None:
            return ((tensor, record),)
        if not self._there(tensor) or storage_of(tensor) is not None:
            return ()
        parts = self.aside(lambda: parts_of(tensor))
        return [known for part in parts for known in self._records(part, op)]

    def _made(self, record: Storage) -> bool:
        """Whether an operator made it, as far as is known: a view's is only seen there."""
        return record.op not in UNMADE and record.op not in self.work.views


def _own_memory(tensor: torch.Tensor) -> bool:
    """Whether torch's allocator made what is behind `tensor`: nobody else's can have another size."""
    storage = storage_of(tensor)
    return storage is not None and storage.resizable()


def another_thread() -> tuple[str, Any, str]:
    """The gap that this thread is."""
    name = threading.current_thread().name
    told = "what it makes is in no figure; open the ledger in the thread that runs the loop"
    return f"thread {name}", "all", f"thread {name!r} worked while a ledger was open in another: {told}"
