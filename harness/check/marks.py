"""Reads the marks of the pytest plugin: what a test asks of its memory, and of which device. It imports no torch."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

from harness.config import hardware_page
from harness.device import allocator_settings
from harness.ledger.categories import CATEGORIES, KERNEL
from harness.tables import parse_size

BUDGETED = (*CATEGORIES, "total", "saved")
"""What can have a budget: each category's own peak, their common peak, and the most activations saved for backward."""
BUDGETED_ON_CARD = (*CATEGORIES, KERNEL, "total", "saved", "reserved")
"""With `hardware`, what kernels take, and the most that the caching allocator reserves, can have a budget too."""
OPTIONS = ("hardware", "allocator", "assume")
"""The options of a rehearsal, which either mark may have."""
BUDGET, BASELINE = "memory_budget", "memory_baseline"


class _Kind(NamedTuple):
    """The names that a kind of mark may have, and the words of its refusals."""

    names: tuple[str, ...]
    named: str
    of: str
    example: str


_KINDS = {
    BUDGET: _Kind((*BUDGETED_ON_CARD, *OPTIONS), "limit", "category", "activations='10 MiB'"),
    BASELINE: _Kind(OPTIONS, "option", "option", "hardware='h100-sxm'"),
}


class Mark(Protocol):
    """A pytest mark."""

    @property
    def name(self) -> str:
        """The mark's name."""

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """The keyword arguments."""


class Request(NamedTuple):
    """What the marks of one test ask.

    limits: bytes by name. hardware: the GPU's page for which the body is rehearsed; None: the body runs. allocator and
    assume: as `harness.rehearse` takes them. fits: whether all must fit into that GPU.
    """

    limits: dict[str, int]
    hardware: str | None = None
    allocator: str | None = None
    assume: float | None = None
    fits: bool = False


def read(marks: Iterable[Mark]) -> Request:
    """What `marks` ask together. The first mark of a kind is the closest to the test, and wins. Raises ValueError."""
    marks = [*marks]
    for mark in marks:
        _check_names(mark)
    budget, baseline = (_merged(mark for mark in marks if mark.name == kind) for kind in (BUDGET, BASELINE))
    options = _options(budget, baseline)
    limits = {name: _bytes(name, value) for name, value in budget.items() if name not in OPTIONS}
    if options["hardware"] is None:
        for name, value in (*budget.items(), *baseline.items()):
            if name not in BUDGETED and value is not None:
                raise ValueError(f"{name}={value!r} is of a rehearsal for a GPU: give hardware= too")
    return Request(limits, **options, fits=bool(budget))


def _check_names(mark: Mark) -> None:
    """Raise ValueError for a mark without names, or with one that is unknown."""
    kind = _KINDS[mark.name]
    if mark.args or (mark.name == BUDGET and not mark.kwargs):
        raise ValueError(f"{mark.name}: give each {kind.named} a name, as {mark.name}({kind.example})")
    for name, value in mark.kwargs.items():
        if name not in kind.names:
            raise ValueError(
                f"{mark.name}({name}={value!r}): no such {kind.of}; one of {', '.join(kind.names)}"
            )


def _merged(marks: Iterable[Mark]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for mark in marks:
        merged = {**mark.kwargs, **merged}
    return merged


def _options(budget: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the test's one rehearsal. Raises ValueError where one is wrong, or where the marks differ."""
    for name in OPTIONS:
        if name in budget and name in baseline and budget[name] != baseline[name]:
            raise ValueError(
                f"{BUDGET}({name}={budget[name]!r}) and {BASELINE}({name}={baseline[name]!r}): a test runs once; give "
                "both the same"
            )
    options: dict[str, Any] = {**dict.fromkeys(OPTIONS), **baseline}
    options.update({name: budget[name] for name in OPTIONS if name in budget})
    for name, value in options.items():
        if value is not None:
            _CHECKS[name](value)
    return options


@cache
def _check_page(name: str) -> None:
    hardware_page.gpu(name)


def _check_hardware(name: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(f"hardware={name!r}: give the name of a page, as 'h100-sxm'")
    _check_page(name)


def _check_allocator(settings: Any) -> None:
    if not isinstance(settings, str):
        raise ValueError(f"allocator={settings!r}: give a text, as 'expandable_segments:True'")
    try:
        allocator_settings.parse(settings)
    except ValueError as error:
        raise ValueError(f"allocator={settings!r}: {error}") from None


def _check_assume(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"assume={value!r}: give a number, which is taken for every unknown value")


_CHECKS = {"hardware": _check_hardware, "allocator": _check_allocator, "assume": _check_assume}


def _bytes(name: str, amount: Any) -> int:
    try:
        if isinstance(amount, bool) or not isinstance(amount, (int, str)):
            raise ValueError("not a size; give bytes, or a text as '10 MiB'")
        return parse_size(str(amount))
    except ValueError as error:
        raise ValueError(f"{BUDGET}({name}={amount!r}): {error}") from None
