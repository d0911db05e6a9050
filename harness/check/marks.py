"""Reads the marks of the pytest plugin: what a test asks of its memory, and of which device. It imports no torch."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

from harness.config import hardware_page
from harness.device import allocator_settings
from harness.ledger.categories import CATEGORIES, KERNEL
from harness.record.links import LINKS, STORAGE
from harness.tables import parse_size

BUDGETED = (*CATEGORIES, "total", "saved")
"""What can have a budget: each category's own peak, their common peak, and the most activations saved for backward."""
BUDGETED_ON_CARD = (*CATEGORIES, KERNEL, "total", "saved", "reserved")
"""With `hardware`, what kernels take, and the most that the caching allocator reserves, can have a budget too."""
OPTIONS = ("hardware", "allocator", "assume")
"""The options of a rehearsal, which either mark may have."""
TRAFFIC, PER_NODE = "traffic", "per_node"
"""The most that the test may move, by link, and how many consecutive ranks are on each node."""
ALL_LINKS = "all"
MOVED_OVER = (*(link for link in LINKS if link != STORAGE), ALL_LINKS)
"""What `traffic` may have a limit for. Files are read and written without torch, so that no test's are counted."""
BUDGET, BASELINE = "memory_budget", "memory_baseline"


class _Kind(NamedTuple):
    """The names that a kind of mark may have, and the words of its refusals."""

    names: tuple[str, ...]
    named: str
    of: str
    example: str


_KINDS = {
    BUDGET: _Kind(
        (*BUDGETED_ON_CARD, TRAFFIC, PER_NODE, *OPTIONS), "limit", "category", "activations='10 MiB'"
    ),
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
    assume: as `harness.rehearse` takes them. fits: whether all must fit into that GPU. traffic: the most payload bytes
    by link. per_node: how many consecutive ranks are on each node; None: as torchrun says.
    """

    limits: dict[str, int]
    hardware: str | None = None
    allocator: str | None = None
    assume: float | None = None
    fits: bool = False
    traffic: Mapping[str, int] | None = None
    per_node: int | None = None


def read(marks: Iterable[Mark]) -> Request:
    """What `marks` ask together. The first mark of a kind is the closest to the test, and wins. Raises ValueError."""
    marks = [*marks]
    for mark in marks:
        _check_names(mark)
    budget, baseline = (_merged(mark for mark in marks if mark.name == kind) for kind in (BUDGET, BASELINE))
    options = _options(budget, baseline)
    traffic: dict[str, int] = {}
    for mark in marks:
        if TRAFFIC in mark.kwargs:
            traffic = {**_traffic(mark.kwargs[TRAFFIC]), **traffic}
    others = {*OPTIONS, TRAFFIC, PER_NODE}
    limits = {name: _bytes(name, value) for name, value in budget.items() if name not in others}
    if options["hardware"] is None:
        for name, value in (*budget.items(), *baseline.items()):
            if name not in (*BUDGETED, TRAFFIC, PER_NODE) and value is not None:
                raise ValueError(f"{name}={value!r} is of a rehearsal for a GPU: give hardware= too")
    per_node = _per_node(budget.get(PER_NODE), traffic)
    return Request(limits, **options, fits=bool(budget), traffic=traffic, per_node=per_node)


def _traffic(limits: Any) -> dict[str, int]:
    """The most payload bytes by link. Raises ValueError."""
    if not isinstance(limits, Mapping) or not limits:
        raise ValueError(f"{BUDGET}({TRAFFIC}={limits!r}): give limits by link, as {{'network': '2 GiB'}}")
    for link in limits:
        if link not in MOVED_OVER:
            why = "what a test reads and writes is not counted" if link == STORAGE else "no such link"
            raise ValueError(f"{BUDGET}({TRAFFIC}={limits!r}): {link}: {why}; one of {', '.join(MOVED_OVER)}")
    return {link: _bytes(TRAFFIC, limit, f"{{{link!r}: {limit!r}}}") for link, limit in limits.items()}


def _per_node(ranks: Any, traffic: Mapping[str, int]) -> int | None:
    """The ranks on each node. Raises ValueError."""
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1):
        raise ValueError(f"{BUDGET}({PER_NODE}={ranks!r}): give how many ranks are on a node, 1 or more")
    if ranks is not None and not traffic:
        raise ValueError(
            f"{BUDGET}({PER_NODE}={ranks!r}): it says which link is crossed: give {TRAFFIC}= too"
        )
    return ranks


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


def _bytes(name: str, amount: Any, shown: str = "") -> int:
    try:
        if isinstance(amount, bool) or not isinstance(amount, (int, str)):
            raise ValueError("not a size; give bytes, or a text as '10 MiB'")
        return parse_size(str(amount))
    except ValueError as error:
        raise ValueError(f"{BUDGET}({name}={shown or repr(amount)}): {error}") from None
