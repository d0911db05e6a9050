"""Which parameters a transfer of DeepSpeed's ZeRO is for, read off its engine when it calls the process group.

ZeRO sends flat tensors of its own, with the parts of several parameters. It keeps which ones: gradients in
`ipg_buckets`, by `ds_status` the parameters that it is gathering, and their names in `param_names` (DeepSpeed 0.19). A
deep model has thousands of parameters and thousands of transfers in a step, so not all are looked at for each.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

REDUCTIONS = ("all-reduce", "reduce-scatter", "all-to-all", "reduce")
IN_FLIGHT = "INFLIGHT"


class ZeroParameters:
    """The parameters of `engine` that are on their way."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._sent: set[int] = set()  # by place in `_all`: those in flight, and in a transfer
        self._place = 0  # of the last that was gathered

    @cached_property
    def _all(self) -> list[tuple[Any, str]]:
        """Each parameter and its name, in the model's order."""
        return list(self._engine.param_names.items())

    def shares(self, operation: str, elements: int, ranks: int) -> Mapping[str, int]:
        """Elements by parameter of a transfer of so many `elements` among so many `ranks`. Empty: it is not known."""
        if operation == "all-gather":
            return dict(self._gathered(elements, ranks))
        return dict(self._reduced()) if operation in REDUCTIONS else {}

    def _gathered(self, elements: int, ranks: int) -> Iterator[tuple[str, int]]:
        self._sent = {place for place in self._sent if self._is_in_flight(place)}
        everywhere = range(len(self._all))
        parts = self._taken(outwards(self._place, len(self._all)), elements, ranks, sent=False)
        if sum(parts.values()) != elements:
            # several are in flight, and each is gathered alone, in the model's order
            parts = self._taken(everywhere, elements, ranks, sent=False)
        missing = elements - sum(parts.values())
        # those sent before are gathered again, with no other in between; or it is not for parameters
        again = self._taken(everywhere, missing, ranks, sent=True)
        if again and sum(again.values()) == missing:
            self._sent = set()
            parts.update(again)
        self._sent.update(parts)
        self._place = max(parts, default=self._place)
        for place in sorted(parts):
            yield self._all[place][1], parts[place]

    def _taken(self, places: Iterable[int], elements: int, ranks: int, *, sent: bool) -> dict[int, int]:
        """So many elements, or all there are, of those in flight that were `sent` or not, by place."""
        parts: dict[int, int] = {}
        for place in places:
            if elements <= 0:
                break
            if self._is_in_flight(place) and (place in self._sent) is sent:
                parts[place] = self._all[place][0].ds_tensor.ds_numel * ranks
                elements -= parts[place]
        return parts

    def _is_in_flight(self, place: int) -> bool:
        return self._all[place][0].ds_status.name == IN_FLIGHT  # type: ignore[no-any-return]

    def _reduced(self) -> Iterator[tuple[str, int]]:
        optimizer = self._engine.optimizer
        buckets = getattr(optimizer, "ipg_buckets", None) or {}
        full = [bucket.params for bucket in buckets.values() if bucket.params]
        if len(full) != 1:  # which of them is sent is not known
            return
        for each in full[0]:
            parameter = optimizer.bit16_groups[each[0]][each[1]] if isinstance(each, tuple) else each
            yield (
                self._engine.param_names.get(parameter, ""),
                getattr(parameter, "ds_numel", parameter.numel()),
            )


def outwards(start: int, length: int) -> Iterator[int]:
    """The numbers below `length`, the nearest to `start` first: neighbours are gathered together."""
    yield from range(start, min(start + 1, length))
    for distance in range(1, length):
        if start + distance < length:
            yield start + distance
        if start >= distance:
            yield start - distance
