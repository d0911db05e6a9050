"""The work of a phase: its operations, and the bytes that its operators read and write.

Bytes are those of an operator's tensors: what a device must move if no data stays in its caches from one operator to
the next. This is an upper bound of the traffic, not a lower bound. A tensor passed twice is read once. A tensor that
is overwritten is not read. An expanded tensor counts without its repetitions. An operator that takes some rows of a
table reads only those. A view and an empty tensor move nothing. Communication between ranks is not counted. Scratch
inside a kernel is not seen.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from harness.ledger.categories import CLASSES
from harness.ledger.op_cost import UNKNOWN, Rule
from harness.ledger.tensors import storage_of

if TYPE_CHECKING:
    from harness.ledger.events import Where


class Part(NamedTuple):
    """The work of one class of operators: floating-point operations, bytes read and written, and how many moved any."""

    flops: int
    read: int
    written: int
    calls: int


class Work(tuple[int, ...]):
    """The model's forward calls, then the four figures of a `Part` for each of `CLASSES`. All are whole numbers that
    add up.
    """

    __slots__ = ()

    def __new__(cls, figures: Iterable[int] = ()) -> Self:
        return super().__new__(cls, tuple(figures) or (0,) * (1 + len(Part._fields) * len(CLASSES)))

    @property
    def forward_calls(self) -> int:
        return self[0]

    @property
    def by_class(self) -> dict[str, Part]:
        """The work of each class that did any."""
        parts = (Part(*self[1 + 4 * number : 5 + 4 * number]) for number in range(len(CLASSES)))
        return {name: part for name, part in zip(CLASSES, parts, strict=True) if any(part)}

    @property
    def flops(self) -> int:
        return sum(self[1::4])

    @property
    def read(self) -> int:
        return sum(self[2::4])

    @property
    def written(self) -> int:
        return sum(self[3::4])


class Counter:
    """Sums the work of operators on one kind of device, by where they ran."""

    def __init__(self, size: Callable[[torch.Tensor], int], where: "Where") -> None:
        self.size = size
        self._totals: dict[Where, list[list[int]]] = {}  # by class; at the end, the forward calls
        self._unknown: set[Where] = set()
        self._disabled = False
        self.enter(where)

    def enter(self, where: "Where") -> None:
        """Work from now on belongs to `where`."""
        if where not in self._totals:
            self._totals[where] = [[0, 0, 0, 0] for _ in CLASSES] + [[0]]
        self._where, self._current = where, self._totals[where]

    def of(self, where: "Where") -> Work | None:
        """The work in `where`. None if part of it was not seen."""
        return None if where in self._unknown else _work(self._totals.get(where, ()))

    def all(self) -> dict["Where", Work]:
        """The work so far, by where."""
        return {where: _work(totals) for where, totals in self._totals.items()}

    def add(self, where: "Where", work: Work | None) -> None:
        """Add `work` to `where`. None: the amount is unknown."""
        if work is None:
            self._unknown.add(where)
        else:
            figures = [first + second for first, second in zip(_work(self._totals[where]), work, strict=True)]
            self._totals[where][-1][0] = figures[0]
            for number, part in enumerate(self._totals[where][:-1]):
                part[:] = figures[1 + 4 * number : 5 + 4 * number]

    def passed(self) -> None:
        """A forward begins that is not part of another."""
        self._current[-1][0] += 1

    @contextmanager
    def off(self) -> Iterator[None]:
        """Nothing counts inside this context."""
        self._disabled = True
        try:
            yield
        finally:
            self._disabled = False

    def count(self, rule: Rule, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operator with this rule, which returned `out` for these arguments."""
        if self._disabled:
            return
        if rule.plain and len(args) > rule.last:
            size = self.size
            read = sum(
                map(size, {id(each): each for each in args if isinstance(each, torch.Tensor)}.values())
            )
            written = size(out)
        elif rule is not UNKNOWN:
            read, written = self._bytes_moved(rule, args, kwargs, out)
        else:
            self._unknown.add(self._where)
            return
        if read or written:
            part = self._current[rule.kind]
            part[1] += read
            part[2] += written
            part[3] += 1
            if rule.flops is not None:
                part[0] += rule.flops(args, kwargs or {}, out)

    def _bytes_moved(self, rule: Rule, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
        """Bytes read and written."""
        read = written = 0
        size, counted = self.size, set[int]()
        for place, name, reads, writes in rule.uses:
            argument = args[place] if place < len(args) else kwargs.get(name) if kwargs else None
            if argument is None:
                continue
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                if id(tensor) in counted or not isinstance(tensor, torch.Tensor):
                    continue
                counted.add(id(tensor))
                nbytes = size(tensor)
                if reads:
                    read += nbytes
                if writes:
                    written += nbytes
        if rule.makes:
            nbytes = size(out) if isinstance(out, torch.Tensor) else sum(map(size, _result_tensors(out)))
            return read + (nbytes if rule.takes else 0), written + nbytes
        if rule.puts is not None:
            nbytes = self._bytes_like(args, rule.puts)
            return read + (nbytes if rule.adds else 0), written + nbytes
        if rule.picks:
            return read + self._bytes_like(args, 1), written
        if rule.may_copy and _share_no_storage(args[0], out):
            return size(args[0]), size(out)
        return read, written

    def _bytes_like(self, args: Any, place: int) -> int:
        """Bytes of as many elements of the first argument as the argument at `place` has."""
        source, pattern = args[0], args[place] if place < len(args) else None
        if not self.size(source):
            return 0
        return int(source.itemsize * (pattern.numel() if isinstance(pattern, torch.Tensor) else 1))


def _work(totals: Sequence[Sequence[int]]) -> Work:
    *parts, forward_calls = totals or [()]
    return Work(chain(forward_calls, *parts))


def _result_tensors(out: Any) -> list[torch.Tensor]:
    return [each for each in out if isinstance(each, torch.Tensor)] if isinstance(out, (tuple, list)) else []


def _share_no_storage(argument: Any, result: Any) -> bool:
    """Whether both are tensors with storages, and the storages differ."""
    if not isinstance(argument, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    argument_storage, result_storage = storage_of(argument), storage_of(result)
    return (
        argument_storage is not None
        and result_storage is not None
        and argument_storage._cdata != result_storage._cdata
    )
