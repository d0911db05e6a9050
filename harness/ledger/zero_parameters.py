"""Which parameters a transfer of DeepSpeed's ZeRO is for, read off its engine when it calls the process group.

ZeRO sends flat tensors of its own, with the parts of several parameters. It keeps which ones: gradients in
`ipg_buckets`, by `ds_status` the parameters that it is gathering, and their names in `param_names` (DeepSpeed 0.19): to
walk through a model takes long, and a deep one has thousands of transfers in a step.
"""

from collections.abc import Iterator, Mapping
from typing import Any

REDUCTIONS = ("all-reduce", "reduce-scatter", "all-to-all", "reduce")
IN_FLIGHT = "INFLIGHT"


class ZeroParameters:
    """The parameters of `engine` that are on their way."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._sent: set[int] = set()  # in flight, and in a transfer

    def shares(self, operation: str, elements: int, ranks: int) -> Mapping[str, int]:
        """Elements by parameter of a transfer of so many `elements` among so many `ranks`. Empty: it is not known."""
        if operation == "all-gather":
            return dict(self._gathered(elements, ranks))
        return dict(self._reduced()) if operation in REDUCTIONS else {}

    def _gathered(self, elements: int, ranks: int) -> Iterator[tuple[str, int]]:
        names = self._engine.param_names
        in_flight = type(next(iter(names)).ds_status)[IN_FLIGHT]
        parameters = [each for each in names if each.ds_status is in_flight]
        self._sent &= set(map(id, parameters))
        for parameter in parameters:
            if elements > 0 and id(parameter) not in self._sent:
                self._sent.add(id(parameter))
                part = parameter.ds_tensor.ds_numel * ranks
                elements -= part
                yield names[parameter], part

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
