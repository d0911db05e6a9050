"""The log: every storage's allocation and free, with where it happened. Later claims decide a storage's category.

Known limits: a storage that no operator returned and no owner names is not seen here (the allocator's own events
show it as `kernel` or `unattributed`). If an operator frees a storage behind Python's back, the log shows the free
when the storage object is freed. Operators of other threads are not seen, nor operators inside a compiled program
(`compiled.py`).
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from harness.ledger.categories import KERNEL
from harness.ledger.events import Event, KernelMemory, Operator, Storage, Where
from harness.ledger.lines import calling_line
from harness.ledger.tensors import (
    is_wrapper,
    parts_of,
    places,
    sizes_of,
    storage_of,
    tensors_in,
    without_torch_function,
)
from harness.ledger.unseen import Figures, Unseen
from harness.ledger.work import Counter

PRECEDENCE = ("parameters", "optimizer", "communication", "gathered", "kv_cache", "gradients", "inputs")
"""If two owners name one storage, the category listed first wins: a gradient inside a bucket is the bucket."""
RANK = {category: rank for rank, category in enumerate((*PRECEDENCE, "activations", "workspace"))}

CATEGORY_BY_PHASE = {
    "data": "inputs",
    **dict.fromkeys(("idle", "setup", "backward", "step", "checkpoint"), "workspace"),
}
"""The category of an unclaimed storage by the phase that allocated it. Any other phase is part of a forward."""

COLLECTIVES = ("c10d", "_c10d_functional")
"""Namespaces of collective operators. Those of the second return new tensors."""
POINT_TO_POINT = ("send", "recv_", "recv_any_source_", "wait_tensor")
"""Operators that send, receive or wait for one tensor. It keeps its category."""

NOT_OPERATORS = ("", "saved")
"""Not operators, but how the log first meets an existing storage: an owner names it, or autograd saves it."""

_FAKE, _FUNCTIONAL, _PROXY = (
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "FUNCTIONAL", "PROXY")
)
_mode: Any = torch._C._get_dispatch_mode
_function_modes: Any = torch._C._len_torch_function_stack

Result = TypeVar("Result")
Shortcut = Callable[[Any, Any, Any, dict[str, Any]], Any]
"""From an operator, its tensors' types and its arguments to its result. NotImplemented: torch must dispatch it."""

Kernels = Callable[[Any, Sequence[Any], dict[str, Any], Any], Iterable[KernelMemory]]
"""From an operator, its arguments and its result to the memory that its kernel takes beside these."""


class _Death(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("key", "storage")
    key: int
    storage: Storage


class Log(TorchDispatchMode):
    """A dispatch mode that logs storages. It keeps no tensor alive and changes none."""

    supports_higher_order_operators = True

    def __init__(
        self, device: str = "cpu", block: int = 1, lines: bool = False, unseen: Unseen | None = None
    ) -> None:
        super().__init__()
        self.device, self.block, self.lines = device, block, lines
        self.unseen = unseen or Unseen()
        self.where = Where(0, "idle", 0)
        self._on_device = places(device, False)
        self.work = Counter(self._on_device, self.where)
        self.module = ""
        self.recomputing = False
        self.follow: Callable[[], None] | None = None  # called before each operator
        self.settle: Callable[[Any], None] | None = None  # called after each collective, with its arguments
        self.kernels: Kernels | None = (
            None  # called after each operator, with it, its arguments and its result
        )
        self.events: list[Event] = []
        self.operators: list[Operator] = []
        self.recording = False
        self.fakes = False  # whether it counts fake tensors
        self.began = 0  # in nanoseconds
        self._alive: dict[int, _Death] = {}
        self._wrapper_types: dict[type, bool] = {}
        self._paused = False
        self._modes_above: list[TorchDispatchMode] | None = None  # the modes above it, while it is hidden
        self._thread = 0
        self._fake_mode: TorchDispatchMode | None = None
        self._below: Shortcut | None = None

    def __enter__(self) -> "Log":
        self.recording, self.began, self._thread = True, time_ns(), threading.get_ident()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.recording = False
        modes = _get_current_dispatch_mode_stack()
        if self in modes and modes[-1] is not self:
            self.hide()  # the program's own modes entered later stay on
        if self._modes_above is not None:
            self._modes_above = None
            _push_mode(self)
        elif self not in modes:  # another thread closes a generator
            return
        super().__exit__(*exc)

    def restart(self) -> None:
        """Clear the log."""
        self.where, self.module, self.recomputing = Where(0, "idle", 0), "", False
        self.work = Counter(self._on_device, self.where)
        self.events, self.operators, self._alive = [], [], {}
        self._paused, self._modes_above = False, None

    def look(self) -> None:
        """Choose what to count: fake tensors if a FakeTensorMode is on, otherwise tensors with memory."""
        modes = _get_current_dispatch_mode_stack()
        self._fake_mode = next((mode for mode in modes if isinstance(mode, FakeTensorMode)), None)
        self.fakes = self._fake_mode is not None
        self._below = getattr(modes[-1], "shortcut", None) if self.fakes else None
        self._on_device = self.work.on_device = places(self.device, self.fakes)

    def here(self) -> bool:
        """Whether the log sees this thread: its own thread, or one to which autograd passed its modes.

        While a compiler traces a caller it runs in another thread, and the caller must do nothing.
        """
        if torch.compiler.is_compiling() or not self.recording:
            return False
        if threading.get_ident() == self._thread or self in _get_current_dispatch_mode_stack():
            return True
        self.unseen.note(*another_thread())
        return False

    def traced(self) -> bool:
        """Whether the program is only traced now, to obtain a graph of it."""
        graph = _mode(_PROXY) is not None or _mode(_FUNCTIONAL) is not None
        return graph or (not self.fakes and _mode(_FAKE) is not None)

    @property
    def hidden(self) -> bool:
        """Whether operators are hidden now."""
        return self._modes_above is not None

    def sleep(self) -> None:
        """Stop recording: in a forked child nobody reads the log."""
        self._paused, self.recording = True, False

    def hide(self) -> None:
        """Until `show`, no operator is seen. Frees still are."""
        self._modes_above = []
        while (mode := _pop_mode()) is not self:
            self._modes_above.append(mode)
        for mode in reversed(self._modes_above):
            _push_mode(mode)

    def show(self) -> None:
        """Undo `hide`."""
        if self._modes_above is None:  # the log was closed while hidden
            return
        above, self._modes_above = self._modes_above, None
        for _ in above:
            _pop_mode()
        for mode in (self, *reversed(above)):
            _push_mode(mode)

    @contextmanager
    def opaque(self, name: str) -> Iterator[None]:
        """Inside this context only the allocator's events are seen. To the log it is one operator."""
        began, hidden = time_ns(), self._modes_above is not None
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

    def aside(self, call: Callable[[], Result]) -> Result:
        """Return `call()`. Its operators belong to the ledger and are not logged."""
        before, self._paused = self._paused, True
        try:
            return call()
        finally:
            self._paused = before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Prevent a wrapper against tracing: it costs as much as the log, and only a compiler needs it."""
        return False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Make a compiler ignore this mode: what is compiled without the log is also compiled with it."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As `is_infra_mode`."""
        return True

    def shortcut(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operator on fake tensors that the mode below knows without a dispatch, which is logged.

        NotImplemented where it does not, or where torch must dispatch it.
        """
        assert self._below is not None
        if self._paused or self.traced() or _mode(_FAKE) is not self._fake_mode:
            return NotImplemented
        began = time_ns()
        out = self._below(func, types, args, kwargs)
        if out is not NotImplemented and func.namespace != "prim":
            if self.follow is not None:
                self.follow()
            self._note(func, args, kwargs, out, began, _is_collective(func))
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._below is not None:
            out = self.shortcut(func, types, args, kwargs or {})
            if out is not NotImplemented:
                return out
        if types:
            if self.traced():
                return func(*args, **kwargs) if kwargs else func(*args)
            for tensor_type in types:
                if (
                    self._wrapper_types[tensor_type]
                    if tensor_type in self._wrapper_types
                    else self._is_wrapper_type(tensor_type, args, kwargs)
                ):
                    return NotImplemented  # the log then sees the operators on the wrapped tensors
        if self._paused:
            return func(*args, **kwargs) if kwargs else func(*args)
        space = func.namespace
        if space == "prim":  # a question about a tensor, such as its device
            return func(*args)
        if self.follow is not None:
            self.follow()
        began = time_ns()
        out = func(*args, **kwargs) if kwargs else func(*args)
        collective = _is_collective(func)
        if collective and self.settle is not None:
            self.settle(args)
        self._note(func, args, kwargs, out, began, collective)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, began: int, collective: bool) -> None:
        """As `_write`, seen by no mode of the program, and without its errors."""
        write = self._write if not _function_modes() else without_torch_function(self._write)
        try:
            write(func, args, kwargs, out, began, collective)
        except Exception as error:  # an unforeseen kind of tensor must not stop the run
            self.report_failure(func.__name__, error)

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any, began: int, collective: bool) -> None:
        """Log that `func` returned `out` for these arguments."""
        name, ended = func.__name__, time_ns()
        self.operators.append(Operator(began, ended, self.where, self.module, name))
        self.work.count(func, args, kwargs, out)
        kernel = [*self.kernels(func, args, kwargs or {}, out)] if self.kernels is not None else ()
        if kernel:
            self._scratch(name, [memory for memory in kernel if memory.first], ended)
        if type(out) is torch.Tensor:
            self.see(out, name, ended)
        elif out is not None:
            for tensor in tensors_in(out):
                self.see(tensor, name, ended)
        if collective:
            self._communicated((args, out), name, ended)
        if kernel:
            self._scratch(name, [memory for memory in kernel if not memory.first], ended)

    def _scratch(self, op: str, kernel: Sequence[KernelMemory], now: int) -> None:
        """Log the memory of a kernel, one moment after the other."""
        for moment in dict.fromkeys(memory.moment for memory in kernel):
            records = [
                Storage(
                    self._rounded(memory.nbytes), 0, now, self.where, self.module, op, KERNEL, memory.name
                )
                for memory in kernel
                if memory.moment == moment
            ]
            for record in records:
                self.events.append(Event(now, record.nbytes, record, self.where, self.module))
            if moment is not None:
                for record in reversed(records):
                    self._end(record, now)

    def _is_wrapper_type(self, tensor_type: type, args: Any, kwargs: Any) -> bool:
        self._wrapper_types[tensor_type] = without_torch_function(is_wrapper)(tensor_type, (args, kwargs))
        return self._wrapper_types[tensor_type]

    def report_failure(self, name: str, error: Exception, figures: Figures = "storages") -> None:
        """Report that the ledger itself failed at `name`. The program continues."""
        message = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        scope = "" if figures == "all" else f" of {figures}"
        self.unseen.note(
            name,
            figures,
            f"{name} is not in the figures{scope}: the ledger could not read it ({message})",
        )

    def _communicated(self, tensors: Any, op: str, now: int) -> None:
        """Tensors that a collective sent, filled or returned are `communication`, unless an owner names them."""
        for tensor in tensors_in(tensors):
            record = self.see(tensor, op, now)
            if record is not None and not record.name:
                record.category = "communication"

    def see(self, tensor: torch.Tensor, op: str, now: int) -> Storage | None:
        """The record of `tensor`'s storage, created if it is new. None if it has no storage on this device."""
        if not self._on_device(tensor):
            return None
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, ValueError):  # no storage
            self._see_parts(tensor, op, now)
            return None
        key = storage._cdata
        death = self._alive.get(key)
        if death is not None:
            record = death.storage
            if self._size(storage) != record.nbytes:  # resized in place: a new block replaces the old
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
        except RuntimeError:  # a storage without memory
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
        if self.lines and op:  # without an operator it was allocated elsewhere
            record.line = calling_line()
        death = _Death(storage, self._storage_freed)
        death.key, death.storage = key, record
        self._alive[key] = death
        if record.nbytes:
            self.events.append(Event(now, record.nbytes, record, where, module))
        return record

    @property
    def makes(self) -> str:
        """The category of a storage that is allocated now and that no owner claims."""
        return "activations" if self.recomputing else CATEGORY_BY_PHASE.get(self.where.phase, "activations")

    def _size(self, storage: torch.UntypedStorage) -> int:
        return self._rounded(storage.nbytes())

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.block) * self.block

    def alive(self, key: int) -> Storage | None:
        """The record of the storage with this `_cdata`. None if it has not been seen."""
        death = self._alive.get(key)
        return None if death is None else death.storage

    def _storage_freed(self, death: _Death) -> None:
        if self._alive.get(death.key) is death:
            del self._alive[death.key]
        self._end(death.storage, time_ns())

    def _end(self, record: Storage, now: int) -> None:
        if self.recording and record.died is None:
            record.died = now
            if record.nbytes:
                self.events.append(Event(now, -record.nbytes, record, self.where, self.module))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Check whether the size of `storage` changed without an operator."""
        death = self._alive.get(storage._cdata)
        if death is not None and self._size(storage) != death.storage.nbytes:
            self._end(death.storage, time_ns())
            record = self._begin(storage, death.key, "resize_", time_ns())
            if record is not None:  # the owner stays the same
                record.category, record.name, record.parts = (
                    death.storage.category,
                    death.storage.name,
                    death.storage.parts,
                )

    def enter(self, where: Where) -> None:
        """From now on everything happens in `where`."""
        self.where = where
        self.work.enter(where)
        self.events.append(Event(time_ns(), 0, None, where, self.module))

    def save(self, tensors: Any) -> None:
        """Autograd saves the tensors in `tensors` for backward."""
        for part in (tensors,) if type(tensors) is torch.Tensor else tensors_in(tensors):
            for _, record in self._records(part, "saved"):
                if record.saved_at is None:
                    record.saved_at = time_ns()
                    saved = Event(record.saved_at, 0, record, self.where, self.module, saved=True)
                    self.events.append(saved)

    def claim(self, category: str, name: str, tensor: torch.Tensor, base: bool = False) -> None:
        """Set the category of `tensor`'s storage, for its whole life. `base`: it existed before the log began."""
        for inner in tensors_in(tensor):
            for part, record in self._records(inner, ""):
                if base and not record.base and not self._made_by_operator(record):
                    record.base = not self.recording or _own_memory(part)
                if category == "parameters" and part.nbytes < record.nbytes:
                    record.has(name, part)
                if not record.name or RANK[category] < RANK[record.category]:
                    record.category, record.name = category, name

    def _records(self, tensor: torch.Tensor, op: str) -> Sequence[tuple[torch.Tensor, Storage]]:
        """`tensor` with its storage's record. For a tensor without a storage, its parts with theirs."""
        record = self.see(tensor, op, time_ns())
        if record is not None:
            return ((tensor, record),)
        if not self._on_device(tensor) or storage_of(tensor) is not None:
            return ()
        parts = self.aside(lambda: parts_of(tensor))
        return [part_and_record for part in parts for part_and_record in self._records(part, op)]

    def living(self) -> list[Storage]:
        """The records of all storages that are alive now."""
        return [death.storage for death in [*self._alive.values()]]

    def _made_by_operator(self, record: Storage) -> bool:
        """Whether an operator allocated it, as far as known. An operator that returns a view only shows a storage."""
        return record.op not in NOT_OPERATORS and record.op not in self.work.views


def _is_collective(func: Any) -> bool:
    return func.namespace in COLLECTIVES and func.__name__.partition(".")[0] not in POINT_TO_POINT


def _own_memory(tensor: torch.Tensor) -> bool:
    """Whether torch's allocator allocated the memory of `tensor`: only such a storage is resizable."""
    storage = storage_of(tensor)
    return storage is not None and storage.resizable()


def another_thread() -> tuple[str, Any, str]:
    """The gap for work in this thread."""
    name = threading.current_thread().name
    advice = "what it makes is in no figure; open the ledger in the thread that runs the loop"
    return f"thread {name}", "all", f"thread {name!r} worked while a ledger was open in another: {advice}"
