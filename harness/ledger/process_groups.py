"""Reports to the traffic what is given to process groups.

An exact ledger's log sees the operators of the dispatcher, in which every call ends. A ledger that sums owners replaces
the methods of the class, which Python calls: it does not see what C++ calls, as for DistributedDataParallel, DTensor,
functional collectives and compiled graphs, nor copies between host and device, and says so: the groups number what they
are given.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from harness.ledger.collective_kinds import BARRIERS, METHODS, UNKNOWN, Collective
from harness.ledger.collectives import group_of
from harness.ledger.group_numbers import GroupNumbers
from harness.ledger.patch import patched
from harness.ledger.patch_table import GROUP, PATCHES
from harness.ledger.tensors import tensors_in, without_torch_function
from harness.ledger.traffic import Traffic
from harness.ledger.unseen import Figures


class ProcessGroups:
    """Counts what this rank gives to its process groups. `failed` is told of what could not be counted."""

    def __init__(self, traffic: Traffic, failed: Callable[[str, Exception, Figures], None]) -> None:
        self._traffic, self._failed = traffic, failed
        self._ranks: dict[tuple[str, int], tuple[int, ...]] = {}
        self._numbers = GroupNumbers()
        self._open = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the calls of methods inside this context. Raises DoesNotFit."""
        kinds = {**METHODS, **dict.fromkeys(BARRIERS)}
        with patched(
            *(PATCHES[f"{GROUP}.{name}"].by(partial(self._counted, kind)) for name, kind in kinds.items())
        ):
            self._numbers.begin()
            self._open = True
            try:
                yield
            finally:
                self.look()
                self._open = False

    def look(self) -> None:
        """Note what the groups were given so far since the ledger watches, if it was not all by Python."""
        if not self._open:
            return
        if others := self._numbers.others():
            times = "once" if others == 1 else f"{others:,} times"
            self._traffic.unseen(
                "process groups",
                f"{times} C++ gave a process group something to send{_BY_CPP}: {_ONLY_EXACT}",
            )
        if backends := self._numbers.without():
            names = " and ".join(backends)
            sentence = f"what C++ gives a process group of {names}{_BY_CPP}, cannot be known: {_ONLY_EXACT}"
            self._traffic.unseen("other process groups", sentence)

    def _counted(self, collective: Collective | None, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._open or torch.compiler.is_compiling():
                return original(group, *args, **kwargs)
            with self._numbers.by_python(group):
                work = original(group, *args, **kwargs)
            if collective is not None:
                self.count(collective, group, [*args, *kwargs.values()])
            return work

        # a subclass of ProcessGroup calls what has another name once more, as if it were its own
        call.__code__ = call.__code__.replace(co_name=original.__name__)
        return call

    def operator(self, collective: Collective, arguments: Sequence[Any], result: Any) -> None:
        """Count an operator of the dispatcher."""
        group = next((group for each in arguments if (group := group_of(each)) is not None), None)
        if group is not None:  # else it sends nothing, as what only wraps a tensor
            self.count(collective, group, [*arguments, result])

    @without_torch_function
    def count(self, collective: Collective, group: Any, arguments: Sequence[Any]) -> None:
        """Count what has these `arguments`, and its result last where that may be larger."""
        try:
            if collective == UNKNOWN:
                raise ValueError("it is no operation that is known")
            ranks = self._ranks_of(group)
            if len(ranks) < 2:  # nothing moves
                return
            if collective.peer is not None:
                ranks = tuple(sorted((ranks[group.rank()], ranks[arguments[collective.peer]])))
            if collective.part is None:
                tensors = max(map(_tensors, arguments), key=_nbytes)
                nbytes = _nbytes(tensors)
            else:
                tensors = _tensors(arguments[collective.part])
                nbytes = _nbytes(tensors) * len(ranks)
            self._traffic.add(collective.name, nbytes, ranks, tensors[0] if tensors else None)
        except Exception as error:  # an unforeseen kind of group or tensor must not stop the run
            self._failed(collective.name or "a transfer between ranks", error, "traffic")

    def _ranks_of(self, group: Any) -> tuple[int, ...]:
        key = group.group_name, group.size()
        if key not in self._ranks:
            self._ranks[key] = tuple(dist.get_process_group_ranks(group))
        return self._ranks[key]


_BY_CPP = ", as DistributedDataParallel, DTensor, functional collectives and compiled graphs do"
_ONLY_EXACT = "it is not in the traffic, and only an exact ledger sees it"


def sends_unseen(model: torch.nn.Module) -> str:
    """What of `model` sends in a way that the methods of process groups do not show; empty where nothing does."""
    kinds = {
        "DistributedDataParallel": lambda module: isinstance(module, DistributedDataParallel),
        "a compiled module": lambda module: (
            getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        ),
    }
    names = [name for name, fits in kinds.items() if any(map(fits, model.modules()))]
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        names.append("DTensor")
    return ", ".join(names)


def _tensors(argument: Any) -> list[torch.Tensor]:
    return [*tensors_in(argument)]


def _nbytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
