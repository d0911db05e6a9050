"""What a phase has to do: operations counted, and bytes that its operators take and make.

Bytes are those of an operator's tensors, so they are at least what a device must move if nothing stays in its caches
from one operator to the next: an upper bound of the traffic, and a lower bound of nothing. A tensor given twice is read
once, one that is written over is not read, an expanded one is as small as what it repeats, and where an operator takes
some rows of a table it reads those. A view moves nothing, nor does an empty tensor; what ranks send each other is not
counted. Scratch inside a kernel is not seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from harness.ledger.op_cost import UNKNOWN, Rule, rule_of, views
from harness.ledger.tensors import parts_of, storage_of

if TYPE_CHECKING:
    from harness.ledger.events import Where


class Work(NamedTuple):
    """Floating-point operations, bytes read and written, and how often a model's forward began."""

    flops: int
    read: int
    written: int
    passes: int = 0


class Counter:
    """Adds up the work of operators on one kind of device, by where they ran."""

    def __init__(self, there: Callable[[torch.Tensor], bool], where: "Where") -> None:
        self.there = there
        self.views: set[str] = set()  # operators seen so far that make nothing, but show what was there
        self._rules: dict[Any, Rule | None] = {}
        self._done: dict[Where, list[int]] = {}
        self._unknown: set[Where] = set()
        self._off = False
        self.enter(where)

    def enter(self, where: "Where") -> None:
        """What follows is done in `where`."""
        self._where, self._here = where, self._done.setdefault(where, [0, 0, 0, 0])

    def of(self, where: "Where") -> Work | None:
        """What was done in `where`; None where not all of it was seen."""
        return None if where in self._unknown else Work(*self._done.get(where, (0, 0, 0)))

    def all(self) -> dict["Where", Work]:
        """What was done so far, everywhere."""
        return {where: Work(*done) for where, done in self._done.items()}

    def add(self, where: "Where", work: Work | None) -> None:
        """Count `work` as done in `where`; None: nobody knows how much it was."""
        if work is None:
            self._unknown.add(where)
        else:
            self._done[where][:] = map(sum, zip(self._done[where], work, strict=True))

    def passed(self) -> None:
        """A forward begins that is no part of another."""
        self._here[3] += 1

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it nothing counts."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """`func` has made `out` of these."""
        try:
            rule = self._rules[func]
        except KeyError:
            rule = self._rules[func] = rule_of(func)
            if views(func):
                self.views.add(func.__name__)
        if rule is None or self._off:
            return
        if rule is UNKNOWN:
            self._unknown.add(self._where)
            return
        read, written = self._moved(rule, args, kwargs or {}, out)
        here = self._here
        here[1] += read
        here[2] += written
        if rule.flops is not None and (read or written):
            here[0] += rule.flops(args, kwargs or {}, out)

    def _moved(self, rule: Rule, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
        """Bytes read and written."""
        read = written = 0
        known: list[torch.Tensor] = []
        for place, argument in (*enumerate(args), *kwargs.items()) if kwargs else enumerate(args):
            if isinstance(argument, torch.Tensor):
                tensors: Any = (argument,)
            elif isinstance(argument, (list, tuple)):
                tensors = argument
            else:
                continue
            for tensor in tensors:
                if not isinstance(tensor, torch.Tensor) or any(tensor is each for each in known):
                    continue
                known.append(tensor)
                size = self._size(tensor)
                if place not in rule.unread:
                    read += size
                if place in rule.mutated:
                    written += size
        if rule.puts is not None:
            some = self._elements(args, rule.puts)
            written += some
            read += some if rule.adds else 0
        elif rule.picks:
            read += self._elements(args, 1)
        elif rule.makes:
            made = sum(map(self._size, _tensors(out)))
            written += made
            read += made if rule.takes else 0
        elif rule.may_copy and _apart(args[0], out):
            return self._size(args[0]), self._size(out)
        return read, written

    def _size(self, tensor: torch.Tensor) -> int:
        """Bytes of `tensor` in memory, what is repeated in it once; 0 on another device."""
        if not self.there(tensor):
            return 0
        try:
            stride = tensor.stride()
        except RuntimeError:  # a layout without strides
            storage = storage_of(tensor)
            return storage.nbytes() if storage is not None else sum(map(self._size, parts_of(tensor)))
        if 0 in stride and tensor.numel():
            return tensor.itemsize * prod(
                size for size, step in zip(tensor.shape, stride, strict=True) if step
            )
        return tensor.nbytes

    def _elements(self, args: Any, place: int) -> int:
        """Bytes of as many elements of the first argument as the one at `place` has."""
        whole, like = args[0], args[place] if place < len(args) else None
        if not self.there(whole):
            return 0
        return int(whole.itemsize * (like.numel() if isinstance(like, torch.Tensor) else 1))


def _tensors(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    return [each for each in out if isinstance(each, torch.Tensor)] if isinstance(out, (tuple, list)) else []


def _apart(taken: Any, made: Any) -> bool:
    """Whether two tensors share no storage."""
    if not isinstance(taken, torch.Tensor) or not isinstance(made, torch.Tensor):
        return False
    one, other = storage_of(taken), storage_of(made)
    return one is not None and other is not None and one._cdata != other._cdata
