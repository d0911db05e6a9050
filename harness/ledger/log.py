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
from functools import partial
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
from harness.ledger.op_cost import Collective, Traits, traits_by_id, traits_of
from harness.ledger.tensors import (
    PLAIN_TYPES,
    is_wrapper,
    parts_of,
    places,
    sizes,
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

NOT_OPERATORS = ("", "saved")
"""Not operators, but how the log first meets an existing storage: an owner names it, or autograd saves it."""

_FAKE, _FUNCTIONAL, _PROXY = (
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "FUNCTIONAL", "PROXY")
)
_mode: Any = torch._C._get_dispatch_mode
_function_modes: Any = torch._C._len_torch_function_stack
_backward: Any = torch._C._current_graph_task_id
_operator, _event = partial(tuple.__new__, Operator), partial(tuple.__new__, Event)

Result = TypeVar("Result")
Shortcut = Callable[[Any, Any, Any, dict[str, Any]], Any]
"""From an operator, its tensors' types and its arguments to its result. NotImplemented: torch must dispatch it."""

Kernels = Callable[[Any, Sequence[Any], dict[str, Any], Any], Iterable[KernelMemory]]
"""From an operator, its arguments and its result to the memory that its kernel takes beside these."""


class _Death(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("key", "nbytes", "storage")
    key: int
    nbytes: int  # as the storage has it, not rounded up
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
        self._be_in(Where(0, "idle", 0))
        self._on_device = places(device, False)
        self.work = Counter(sizes(device, False), self.where)
        self.module = ""
        self.recomputing = False
        self.recomputes_unseen = False  # whether a backward ran that may compute activations again inside
        # called before an operator if it is of a backward in a phase "forward", or of none in a phase "backward"
        self.follow: Callable[[], None] | None = None
        self.settle: Callable[[Any], None] | None = None  # called after each collective, with its arguments
        # called after each operator of a process group, with its kind, its arguments and its result
        self.transferred: Callable[[Collective, Any, Any], None] | None = None
        # called after each copy, with its source and its destination
        self.copied: Callable[[Any, Any], None] | None = None
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
        self._be_in(Where(0, "idle", 0))
        self.module, self.recomputing, self.recomputes_unseen = "", False, False
        self.work = Counter(sizes(self.device, self.fakes), self.where)
        self.events, self.operators, self._alive = [], [], {}
        self._paused, self._modes_above = False, None

    def look(self) -> None:
        """Choose what to count: fake tensors if a FakeTensorMode is on, otherwise tensors with memory."""
        modes = _get_current_dispatch_mode_stack()
        self._fake_mode = next((mode for mode in modes if isinstance(mode, FakeTensorMode)), None)
        self.fakes = self._fake_mode is not None
        below = modes[-1] if self.fakes else None
        self._below = getattr(below, "shortcut", None) if isinstance(below, (Log, FakeTensorMode)) else None
        self._on_device = places(self.device, self.fakes)
        self.work.size = sizes(self.device, self.fakes)

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
                Operator(began, self.where, self.module, name, time_ns(), self.makes, self.recomputing)
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
        if self._below is None or self._paused or self._modes_above is not None or not self.recording:
            return NotImplemented
        if self.traced() or _mode(_FAKE) is not self._fake_mode:
            return NotImplemented
        out = self._below(func, types, args, kwargs)
        traits = traits_by_id.get(id(func)) or traits_of(func)
        if out is not NotImplemented and not traits.question:
            if (_backward() != -1) is self._turns and self.follow is not None:
                self.follow()
            self.operators.append(_operator((time_ns(), self.where, self.module, traits.name, 0, "", False)))
            self._note(traits, args, kwargs, out)
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._below is not None:
            out = self.shortcut(func, types, args, kwargs or {})
            if out is not NotImplemented:
                return out
        if types:
            if self.traced():
                return func(*args, **kwargs) if kwargs else func(*args)
            if self._wraps_others(types, args, kwargs):
                return NotImplemented  # the log then sees the operators on the wrapped tensors
        traits = traits_by_id.get(id(func)) or traits_of(func)
        call = traits.call
        if self._paused or traits.question:
            return call(*args, **kwargs) if kwargs else call(*args)
        if (_backward() != -1) is self._turns and self.follow is not None:
            self.follow()
        self.operators.append(_operator((time_ns(), self.where, self.module, traits.name, 0, "", False)))
        out = call(*args, **kwargs) if kwargs else call(*args)
        if traits.collective and self.settle is not None:
            self.settle(args)
        self._note(traits, args, kwargs, out)
        return out

    def _note(self, traits: Traits, args: Any, kwargs: Any, out: Any) -> None:
        """Log that an operator returned `out`, without the ledger's own errors."""
        if traits.transfer is not None and self.transferred is not None:
            self.transferred(traits.transfer, args, out)
        try:
            if traits.collective or self.kernels is not None or _function_modes():
                self._write_all(traits, args, kwargs, out)
            elif traits.rule is not None or type(out) is not torch.Tensor:
                self._write(traits, args, kwargs, out)
            else:  # the most frequent: a view
                self.see(out, traits.name, traits.view)
        except Exception as error:  # an unforeseen kind of tensor must not stop the run
            self.report_failure(traits.name, error)

    def _write(self, traits: Traits, args: Any, kwargs: Any, out: Any) -> None:
        """Log that an operator returned `out` for these arguments."""
        if traits.rule is not None:
            self.work.count(traits.rule, args, kwargs, out)
            if traits.copies is not None and self.copied is not None:
                self.copied(args[traits.copies], out)
        if type(out) is torch.Tensor:
            self.see(out, traits.name, traits.view)
        elif out is not None:
            for tensor in tensors_in(out):
                self.see(tensor, traits.name, traits.view)

    @without_torch_function
    def _write_all(self, traits: Traits, args: Any, kwargs: Any, out: Any) -> None:
        """`_write`, with what only a collective has, or an operator on a card that is rehearsed."""
        kernels = self.kernels
        kernel = [*kernels(traits.func, args, kwargs or {}, out)] if kernels is not None else ()
        if kernel:
            self._scratch(traits.name, [memory for memory in kernel if memory.first])
        self._write(traits, args, kwargs, out)
        if traits.collective:
            self._communicated((args, out), traits.name)
        if kernel:
            self._scratch(traits.name, [memory for memory in kernel if not memory.first])

    def _scratch(self, op: str, kernel: Sequence[KernelMemory]) -> None:
        """Log the memory of a kernel, one moment after the other."""
        now = time_ns()
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
                    self._end(record)

    def _wraps_others(self, types: Any, args: Any, kwargs: Any) -> bool:
        """Whether a tensor of one of these types refers to other tensors."""
        known = self._wrapper_types
        return any(
            known[tensor_type] if tensor_type in known else self._is_wrapper_type(tensor_type, args, kwargs)
            for tensor_type in types
        )

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

    def _communicated(self, tensors: Any, op: str) -> None:
        """Tensors that a collective sent, filled or returned are `communication`, unless an owner names them."""
        for tensor in tensors_in(tensors):
            record = self.see(tensor, op)
            if record is not None and not record.name:
                record.category = "communication"

    def see(self, tensor: torch.Tensor, op: str, shown: bool = False) -> Storage | None:
        """The record of `tensor`'s storage, created if it is new. None if it has no storage on this device.

        `shown`: `op` did not allocate a storage that is new here.
        """
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, ValueError):  # no storage
            if self._on_device(tensor):
                self._see_parts(tensor, op)
            return None
        key = storage._cdata
        death = self._alive.get(key)
        if death is not None:
            if storage.nbytes() == death.nbytes or not self._replaced(death, storage):
                return death.storage
            self._end(death.storage)
        elif not self._on_device(tensor):
            return None
        elif tensor.is_nested:
            for sizes in self.aside(lambda: sizes_of(tensor)):
                self.see(sizes, op)
        return self._begin(storage, key, op, shown)

    def _see_parts(self, tensor: torch.Tensor, op: str) -> None:
        parts = self.aside(lambda: parts_of(tensor))
        for part in parts:
            self.see(part, op)
        if not parts and op and not is_lazy(tensor):
            layout = f"tensors of layout {tensor.layout}"
            self.unseen.note(
                layout, "storages", f"{layout} have no storage: their memory is unattributed, or in no figure"
            )

    def _begin(self, storage: torch.UntypedStorage, key: int, op: str, shown: bool) -> Storage | None:
        try:
            pointer = 0 if self.fakes and storage.device.type == "meta" else storage.data_ptr()
        except RuntimeError:  # a storage without memory
            return None
        now, nbytes, where, module = time_ns(), storage.nbytes(), self.where, self.module
        record = Storage(
            nbytes if self.block == 1 else self._rounded(nbytes),
            pointer,
            now,
            where,
            module,
            op,
            "activations" if self.recomputing else self._makes,
            recomputed=self.recomputing,
            shown=shown or op in NOT_OPERATORS,
        )
        if self.lines and op:  # without an operator it was allocated elsewhere
            record.line = calling_line()
        death = self._alive[key] = _Death(storage, self._storage_freed)
        death.key, death.nbytes, death.storage = key, nbytes, record
        if nbytes:
            self.events.append(_event((now, record.nbytes, record, where, module, False)))
        return record

    @property
    def makes(self) -> str:
        """The category of a storage that is allocated now and that no owner claims."""
        return "activations" if self.recomputing else self._makes

    def _replaced(self, death: _Death, storage: torch.UntypedStorage) -> bool:
        """Whether `storage` was resized so that a new block replaces the old."""
        death.nbytes = storage.nbytes()
        return self._rounded(death.nbytes) != death.storage.nbytes

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.block) * self.block

    def alive(self, key: int) -> Storage | None:
        """The record of the storage with this `_cdata`. None if it has not been seen."""
        death = self._alive.get(key)
        return None if death is None else death.storage

    def _storage_freed(self, death: _Death) -> None:
        if self._alive.get(death.key) is death:
            del self._alive[death.key]
        self._end(death.storage)

    def _end(self, record: Storage) -> None:
        if self.recording and record.died is None:
            record.died = now = time_ns()
            if record.nbytes:
                self.events.append(_event((now, -record.nbytes, record, self.where, self.module, False)))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Check whether the size of `storage` changed without an operator."""
        death = self._alive.get(storage._cdata)
        if death is not None and self._replaced(death, storage):
            earlier = death.storage
            self._end(earlier)
            record = self._begin(storage, death.key, "resize_", False)
            if record is not None:  # the owner stays the same
                record.category, record.name, record.parts = earlier.category, earlier.name, earlier.parts

    def enter(self, where: Where) -> None:
        """From now on everything happens in `where`."""
        self._be_in(where)
        self.work.enter(where)
        self.events.append(Event(time_ns(), 0, None, where, self.module))

    def _be_in(self, where: Where) -> None:
        self.where = where
        self._makes = CATEGORY_BY_PHASE.get(where.phase, "activations")
        self._turns = {"forward": True, "backward": False}.get(where.phase)

    def save(self, tensors: Any) -> None:
        """Autograd saves the tensors in `tensors` for backward."""
        for _, record in self._all_records(tensors, "saved"):
            if record.saved_at is None:
                record.saved_at = now = time_ns()
                self.events.append(_event((now, 0, record, self.where, self.module, True)))

    def claim(self, category: str, name: str, tensor: torch.Tensor, base: bool = False) -> None:
        """Set the category of `tensor`'s storage, for its whole life. `base`: it existed before the log began."""
        for part, record in self._all_records(tensor, ""):
            if base and record.shown and not record.base:
                record.base = not self.recording or _own_memory(part)
            if category == "parameters" and part.nbytes < record.nbytes:
                record.has(name, part)
            if not record.name or RANK[category] < RANK[record.category]:
                record.category, record.name = category, name

    def _all_records(self, tree: Any, op: str) -> Sequence[tuple[torch.Tensor, Storage]]:
        """Every tensor in `tree` that has a storage, with its record."""
        if type(tree) in PLAIN_TYPES and (record := self.see(tree, op)) is not None:
            return ((tree, record),)
        return [part_and_record for part in tensors_in(tree) for part_and_record in self._records(part, op)]

    def _records(self, tensor: torch.Tensor, op: str) -> Sequence[tuple[torch.Tensor, Storage]]:
        """`tensor` with its storage's record. For a tensor without a storage, its parts with theirs."""
        record = self.see(tensor, op)
        if record is not None:
            return ((tensor, record),)
        if not self._on_device(tensor) or storage_of(tensor) is not None:
            return ()
        parts = self.aside(lambda: parts_of(tensor))
        return [part_and_record for part in parts for part_and_record in self._records(part, op)]

    def living(self) -> list[Storage]:
        """The records of all storages that are alive now."""
        return [death.storage for death in [*self._alive.values()]]


def _own_memory(tensor: torch.Tensor) -> bool:
    """Whether torch's allocator allocated the memory of `tensor`: only such a storage is resizable."""
    storage = storage_of(tensor)
    return storage is not None and storage.resizable()


def another_thread() -> tuple[str, Any, str]:
    """The gap for work in this thread."""
    name = threading.current_thread().name
    advice = "what it makes is in no figure; open the ledger in the thread that runs the loop"
    return f"thread {name}", "all", f"thread {name!r} worked while a ledger was open in another: {advice}"
