"""What moves: calls and bytes of this rank's transfers, by phase, operation, process group, and what they were for.

The payload of a transfer is the larger of what goes in and what comes out on one rank, as NCCL's tests count it: the
whole tensor that an all-gather fills or a reduce-scatter takes, the tensor of an all-reduce, a broadcast or a send. It
does not depend on how a library sends it. A barrier and the messages of the rendezvous store carry no tensor and are
not counted. `process_groups.py` sees what is given to process groups, the log sees copies, and a program reports what
it reads and writes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from harness.ledger.events import Storage, Where
from harness.ledger.log import Log
from harness.ledger.tensors import device_of, storage_of

HOST_TO_DEVICE, DEVICE_TO_HOST = "host-to-device", "device-to-host"
READ, WRITE = "read", "write"
NOTHING = "nothing"
"""The operation of a phase that moved something in an earlier step and moves nothing from this one on."""


class Moved(NamedTuple):
    """What moved: an `operation` among `ranks`, which are none for a copy, a read or a write.

    `cause` is what it was for: the owner's name of the tensor, or else the module that was running. None: not seen.
    """

    operation: str
    ranks: tuple[int, ...]
    cause: str | None


MOST_STEPS = 100
"""The most steps of a phase that are kept without a log."""

Amounts = dict[Moved, tuple[int, int]]
"""Calls and bytes by what moved."""


class _Kind(NamedTuple):
    operation: str
    ranks: tuple[int, ...]
    storage: Storage | None
    cause: str | None

    def causes(self, nbytes: int) -> Iterator[tuple[Moved, int]]:
        """What it was for, and its part of `nbytes`, with the names that the storage has now: an owner may have claimed
        it later. Where all of a storage moves that several parameters share, each of them has its part.
        """
        storage = self.storage
        shares = [] if storage is None or not storage.nbytes or nbytes % storage.nbytes else storage.shares
        if len(shares) < 2 or storage is None:
            name = storage.name if storage is not None and storage.name else self.cause
            yield Moved(self.operation, self.ranks, name), nbytes
            return
        for name, part in shares:
            yield Moved(self.operation, self.ranks, name), nbytes // storage.nbytes * part


_Sums = dict[_Kind, tuple[int, int]]


class Traffic:
    """Sums the transfers of this rank, by the phase of `log` in which they happen."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # the parameters of a collective's flat tensor: from its operation, elements and ranks, to elements by name
        self.shares: Callable[[str, int, int], Mapping[str, int]] | None = None
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self._sums: dict[Where, _Sums] = {}
        self._kept: dict[tuple[str, int], _Sums] = {}  # by phase, of the last step that is kept
        self._steps: dict[tuple[str, int], deque[Where]] = {}  # by phase, those that are kept
        self._newest: dict[tuple[str, int], Where] = {}  # by phase, the step in which it ended last
        self._ceased: dict[Where, None] = {}  # where nothing moves any more
        self._disabled = False

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Nothing counts inside this context."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def add(
        self,
        operation: str,
        nbytes: int,
        ranks: tuple[int, ...] = (),
        tensor: torch.Tensor | None = None,
        cause: str | None = None,
    ) -> None:
        """Count one transfer of `nbytes`, if it has any. `tensor` is moved, or `cause` says what it was for."""
        if not nbytes or self._disabled:
            return
        log, record = self._log, None
        if log.recording:
            storage = None if tensor is None else storage_of(tensor)
            record = None if storage is None else log.alive(storage._cdata)
            cause = cause or log.module
        kind = _Kind(operation, ranks, record, cause)
        shares: Mapping[str, int] = {}
        if self.shares is not None and tensor is not None and log.recording and not (record and record.name):
            with suppress(Exception):  # an engine of another kind: then it is not known what it is for
                shares = self.shares(operation, nbytes // tensor.itemsize, len(ranks))
        self._count_shares(kind, nbytes, shares)

    def _count_shares(self, kind: _Kind, nbytes: int, shares: Mapping[str, int]) -> None:
        """Count one transfer for these names, in proportion to `shares`. `kind` has what does not divide."""
        calls, rest, whole = 1, nbytes, sum(shares.values())
        for name, share in shares.items() if whole else ():
            part = nbytes * share // whole
            self._count(self._log.where, kind._replace(storage=None, cause=name), calls, part)
            calls, rest = 0, rest - part
        if rest:
            self._count(self._log.where, kind, calls, rest)

    def report(self, operation: str, parts: Mapping[str, int]) -> None:
        """Count a `READ` or a `WRITE` of these bytes by name, which no call of torch shows."""
        if not self._disabled and (nbytes := sum(parts.values())):
            self._count_shares(_Kind(operation, (), None, None), nbytes, parts)

    def copied(self, source: Any, result: Any) -> None:
        """Count a copy between the host and the log's device; a copy with a conversion sends the result's dtype."""
        from_host, to_host = device_of(source) == "cpu", device_of(result) == "cpu"
        if from_host is not to_host:
            self.add(HOST_TO_DEVICE if from_host else DEVICE_TO_HOST, result.nbytes, tensor=result)

    def ended(self, where: Where) -> None:
        """Phase `where` has ended, perhaps to be entered once more.

        When this phase ends in another step, and the same moved as in the one before, the earlier step is not kept.
        """
        phase = where[1:]
        newest = self._newest.get(phase, where)
        if newest != where and not self._repeats(newest):
            self._keep(newest)
        elif newest != where:
            self._sums.pop(newest, None)
        self._newest[phase] = where

    def _keep(self, where: Where) -> None:
        """Keep what moved in `where`; of a phase that moves something else in every step, the newest ones."""
        if self._ceases(where):
            self._ceased[where] = None
        self._kept[where[1:]] = self._sums.get(where, {})
        steps = self._steps.setdefault(where[1:], deque())
        steps.append(where)
        if len(steps) > MOST_STEPS:
            oldest = steps.popleft()
            self._sums.pop(oldest, None)
            self._ceased.pop(oldest, None)
            sentence = f"of a phase in which something else moves each time, the newest {MOST_STEPS} are in the traffic"
            self._log.unseen.note("older steps", "traffic", sentence)

    def _repeats(self, where: Where) -> bool:
        """Whether in `where` moved what is kept of an earlier step."""
        return self._sums.get(where, {}) == self._kept.get(where[1:], {})

    def _ceases(self, where: Where) -> bool:
        """Whether nothing moved in `where`, and something in what is kept of an earlier step."""
        return not self._sums.get(where) and bool(self._kept.get(where[1:]))

    def fill_in(self, where: Where, amounts: Amounts) -> None:
        """Add `amounts` to `where`, for what was not run."""
        for (operation, ranks, cause), (calls, nbytes) in amounts.items():
            self._count(where, _Kind(operation, ranks, None, cause), calls, nbytes)

    def unknown(self, what: str) -> None:
        """Note that `what` is not in these figures."""
        self.unseen(what, f"{what} is not known, and not in the traffic")

    def unseen(self, what: str, sentence: str) -> None:
        """Note in a `sentence` that `what` is not in these figures, in place of an earlier one."""
        self._log.unseen.renew(what, "traffic", sentence)

    def amounts(self) -> dict[Where, Amounts]:
        """What moved so far."""
        totals: dict[Where, Amounts] = {}
        for where, sums in list(self._sums.items()):  # a thread may read while the run counts
            if self._newest.get(where[1:]) == where and self._repeats(where):
                continue
            amounts = totals.setdefault(where, {})
            for kind, (calls, nbytes) in list(sums.items()):
                for moved, part in kind.causes(nbytes) if calls or nbytes else ():
                    earlier = amounts.get(moved, (0, 0))
                    amounts[moved] = earlier[0] + calls, earlier[1] + part
                    calls = 0  # counted once
        for where in (*list(self._ceased), *filter(self._ceases, list(self._newest.values()))):
            totals[where] = {Moved(NOTHING, (), None): (0, 0)}
        return totals

    def _count(self, where: Where, kind: _Kind, calls: int, nbytes: int) -> None:
        sums = self._sums.setdefault(where, {})
        earlier = sums.get(kind, (0, 0))
        sums[kind] = earlier[0] + calls, earlier[1] + nbytes
