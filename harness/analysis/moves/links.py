"""`harness links RUN`: what each link must carry, how long that takes at best, and what a network costs. No torch."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.analysis.args import Parser, refuse
from harness.analysis.moves import fabric, transfers
from harness.analysis.moves.links_model import Need, machine, needs
from harness.analysis.run_settings import settings_in
from harness.analysis.speed.roofline_model import bounds
from harness.record.ceilings import of_page
from harness.record.fields import printable
from harness.record.links import NETWORK
from harness.record.record_file import read
from harness.record.results import Ceilings
from harness.record.schema import Record, parse
from harness.tables import Table, count, seconds, size

if TYPE_CHECKING:
    from harness.config.settings import Hardware, Network

WIDTH = 120
MOST = 2**20
"""The most nodes, and GPUs of a node. No network has a million of them."""

SHORTEST, LONGEST = 1e-9, 1e9
"""Seconds of a step."""

UNITS = {"train": "step", "infer": "decoding step: a token of each sequence"}

NOTES = (
    "Moved: the bytes of the busier direction, of the rank that moves most; on the network, of its node. Needed: so "
    "that the link takes no longer than the step. At best: moved over the link's rate, and calls x latency where a "
    "page has one.",
    "May hide: at most, what engines can move while a phase computes, and no longer than it computes at best: ZeRO's "
    "gathers and reductions, and copies. Messages between stages, and all-reduces inside a layer that ranks share, "
    "hide nothing.",
)
"""What the figures are."""

IN_A_RING = (
    "A ring enters a node once and leaves it once, however many of its ranks are there; groups with one rank on a node "
    "have a ring each."
)


class Asked(NamedTuple):
    """A run, the pages that it is held against, and the seconds that its step shall take."""

    name: str
    record: Record
    hardware: "Hardware | None"
    network: "Network | None"
    seconds: float | None
    needs: list[Need]


def main(argv: Sequence[str]) -> int:
    """Run `harness links [RUN]`; returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        _check(options)
        asked = None if options.run is None else _asked(options)
        nodes, gpus = (options.nodes, options.gpus) if options.nodes else _nodes(asked)
        priced = nodes > 1 or options.nodes is not None
        if options.json:
            found: dict[str, Any] = {} if asked is None else as_json(asked)
            found["bill"] = _bill(nodes, gpus, asked) if priced else None
            print(json.dumps(found, indent=1))
        else:
            parts = [] if asked is None else [text(asked)]
            print("\n\n".join([*parts, *([_bill_text(nodes, gpus, asked)] if priced else [])]))
    except ValueError as error:
        return refuse(error)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "links",
        description="What each link of a run must carry in a step, and how long that takes at best; and the switches, "
        "ports and transceivers of a network for so many nodes.",
        epilog="Exit code 2: a run has no record that can be read, or no traffic in it.",
    )
    parser.takes_runs("?")
    parser.add_argument(
        "--step-seconds",
        type=_seconds,
        metavar="S",
        help="what a step shall take, in inference one of decoding: says which bandwidth each link needs",
    )
    parser.add_argument("--hardware", metavar="NAME", help="a page of conf/hardware; else the run's own")
    parser.add_argument("--network", metavar="NAME", help="a page of conf/network; else the run's own")
    parser.add_argument("--nodes", type=_number, metavar="N", help="the bill of a network of so many nodes")
    parser.add_argument("--gpus", type=_number, metavar="G", help="with --nodes: the GPUs of a node")
    parser.add_argument(
        "--json", action="store_true", help="the same as JSON; null: not counted, or not known"
    )
    return parser


def _seconds(typed: str) -> float:
    with suppress(ValueError):
        if SHORTEST <= (value := float(typed)) <= LONGEST:
            return value
    raise argparse.ArgumentTypeError(f"{typed}: should be seconds from {SHORTEST:g} to {LONGEST:g}")


def _number(typed: str) -> int:
    if not (typed.isascii() and typed.isdecimal() and 1 <= int(typed[:9]) <= MOST and len(typed) < 9):
        raise argparse.ArgumentTypeError(f"{typed}: should be a whole number from 1 to {MOST:,}")
    return int(typed)


def _check(options: argparse.Namespace) -> None:
    if (options.nodes is None) != (options.gpus is None):
        raise ValueError("links: --nodes and --gpus go together; give both, or neither")
    if options.run is None and options.nodes is None:
        raise ValueError("links: give a RUN, or --nodes N --gpus G; --help lists what there is")
    given = [name for name in ("step_seconds", "hardware", "network") if getattr(options, name) is not None]
    if options.run is None and given:
        raise ValueError(f"links: --{given[0].replace('_', '-')} is about a run; give a RUN too")


def _asked(options: argparse.Namespace) -> Asked:
    record = parse(read(options.run), str(options.run))
    hardware, network = pages(record, options.hardware, options.network)
    at_best = computing(record, None if options.hardware is None else hardware)
    found = needs(record, machine(hardware, network, at_best), options.step_seconds)
    name = printable(str(options.run))
    if not found:
        missing = "decoding with traffic" if record.mode == "infer" else "traffic"
        raise ValueError(
            f"links: {name} has no {missing} in its record; a run with ledger=exact of this version counts it"
        )
    return Asked(name, record, hardware, network, options.step_seconds, found)


def pages(
    record: Record, hardware: str | None, network: str | None
) -> "tuple[Hardware | None, Network | None]":
    """The pages of these names, else those of the run. None: not known. Raises ValueError for an unknown name."""
    settings = settings_in(record)
    card, joined = (None, None) if settings is None else (settings.hardware, settings.network)
    unnamed = card is not None and card.link is None and record.world.device == "cuda"
    if hardware is not None or unnamed:
        from harness.config import hardware_page  # not imported where no page is read

        if hardware is not None:
            card = hardware_page.named(hardware)
        elif known := hardware_page.of_device(record.world.device_name or ""):
            card = hardware_page.gpu(known)
    if network is not None:
        from harness.config import network_page

        joined = network_page.named(network)
    return card, joined


def computing(record: Record, hardware: "Hardware | None" = None) -> dict[str, float | None]:
    """The seconds that each phase computes at best, on the run's own machine or on `hardware`."""
    ceilings = None if hardware is None else of_page(hardware, record.model.multiplied) or Ceilings()
    return {each.phase: each.at_best for each in bounds(record, ceilings)[:-1]}


def _nodes(asked: Asked | None) -> tuple[int, int]:
    """The nodes of a run, and the ranks of each; (0, 0) where that is not known."""
    per_node = None if asked is None else asked.record.value("world.per_node")
    if asked is None or not isinstance(per_node, int) or per_node < 1:
        return 0, 0
    return -(-asked.record.world.size // per_node), min(per_node, asked.record.world.size)


def _bill(nodes: int, gpus: int, asked: Asked | None) -> dict[str, Any] | None:
    """The bill as data. None: a run's network is larger than two layers of switches."""
    try:
        bills = fabric.bills(nodes, gpus)
    except ValueError as error:
        if asked is None:
            raise ValueError(f"links: {error}") from None
        return None
    return {
        "nodes": nodes,
        "gpus": gpus,
        "fabrics": {
            name: items if isinstance(items, str) else [each._asdict() for each in items]
            for name, items in bills.items()
        },
    }


def _bill_text(nodes: int, gpus: int, asked: Asked | None) -> str:
    try:
        return fabric.text(nodes, gpus)
    except ValueError as error:
        if asked is None:
            raise ValueError(f"links: {error}") from None
        return f"no bill: {error}."


def as_json(asked: Asked) -> dict[str, Any]:
    """The run, its pages and its links as plain data."""
    return {
        "run": asked.name,
        "of": UNITS.get(asked.record.mode, "step"),
        "step_seconds": asked.seconds,
        "hardware": _name(asked.hardware),
        "network": _name(asked.network),
        "links": [each.as_dict() for each in asked.needs],
    }


def _name(page: "Hardware | Network | None") -> str | None:
    return None if page is None or page.name == "auto" else printable(page.name)


def text(asked: Asked) -> str:
    """A table of the links of a step, and what its figures are."""
    unit = UNITS.get(asked.record.mode, "step")
    card, network = (_name(page) or "not known" for page in (asked.hardware, asked.network))
    lines = [
        f"{asked.name}: {asked.record.heading}",
        f"Of a {unit}. Hardware: {card}. Network: {network}.",
    ]
    table = Table(
        ["rank"], ["calls"], ["moved"], ["needed"], ["has"], ["at best"], ["may hide"], ["not hidden"]
    )
    for need in asked.needs:
        table.row(*_cells(need))
    notes = [*NOTES, *([IN_A_RING] if any(need.link == NETWORK for need in asked.needs) else [])]
    gaps = dict.fromkeys(gap for rank in asked.record.ranks for gap in transfers.gaps(rank))
    said = (*filter(None, map(sentence, asked.needs)), *(f"not counted: {gap}" for gap in gaps), *notes)
    return "\n".join([*lines, table.text(), *(fill(each, WIDTH) for each in said)])


def _cells(need: Need) -> Iterator[str]:
    yield f"  {need.link}"
    yield f"{need.rank}"
    yield f"{need.calls:,.0f}"
    yield size(need.bytes)
    yield count(need.needed, "B/s")
    yield count(need.bandwidth, "B/s")
    yield from map(seconds, (need.at_best, need.hidden, need.shown))


def sentence(need: Need) -> str:
    """Whether a link bounds the step; empty where that is not known."""
    if need.share is None:
        return ""
    if need.share > 1:
        return f"{need.link} bounds the step: it needs {need.share:,.1f} times the rate that it has."
    return f"{need.link} needs {need.share:.1%} of its rate."
