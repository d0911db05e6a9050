"""What the links of a run must carry in a step, how long that takes at best, and how much of it computing may hide.

**Bytes.** A link carries both directions at once, so the bytes of a phase are those of its busier direction. A rank
sends and receives what the record counts by ring; a send, a copy or a read goes one way. The ranks of a node share its
ports. A ring of ranks that stand in order enters each node once and leaves it once, however many of its ranks are
there, because every other step of it is inside the node. If m of the p ranks of a node are in a group, p / m groups of
its kind have ranks there, each with a ring of its own. So a node sends p / m times what one rank sends: with all p in
one ring as much as one rank alone, with one rank in each ring p times as much. That takes the ranks of a node to be
like the one that moves most.

**At best** a phase's bytes take bytes / bandwidth seconds, and calls x latency for the network, where a page has one. A
message takes one step at least, and a ring of n nodes n - 1 steps or more, so this is a lower bound.

**Hidden.** What an engine may do while operators compute (`MAY_HIDE`) cannot hide behind more than its phase computes.
So of a phase it is min(those transfers at best, the phase at best): an upper bound, as if nothing waited for a
transfer. What operators wait for hides nothing: messages between stages, and the all-reduces between the halves of a
layer that ranks share. Nor does what moves in a phase without operators.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.analysis.moves import transfers
from harness.analysis.sweeps.batch import crossing
from harness.record.links import NETWORK, PCIE
from harness.record.memory import Rank, Transfer
from harness.record.schema import Record

if TYPE_CHECKING:
    from harness.config.settings import Hardware, Network

COPIES = ("host-to-device", "device-to-host")
MAY_HIDE = {
    "forward": ("all-gather", *COPIES),
    "backward": ("all-gather", "reduce-scatter", "reduce", "all-reduce", *COPIES),
    "prefill": COPIES,
    "decode": ("host-to-device",),
}
"""Operations that an engine may do beside the operators of a phase: ZeRO's gathers ahead of a layer, its reductions
behind it, and copies, as those of an offloaded cache ahead of a layer. A decoding step waits for what goes to the host.
"""

INTO = ("receive", "host-to-device", "read")
OUT = ("send", "device-to-host", "write")


class Flow(NamedTuple):
    """Bytes that leave a place, and bytes that enter it."""

    out: float = 0
    into: float = 0

    @property
    def busier(self) -> float:
        """Bytes of the direction that has more."""
        return max(self)


class Machine(NamedTuple):
    """Bytes a second of each link in each direction, those of the network for a node; the network's latency in seconds;
    and the seconds that each phase computes at best.
    """

    rates: Mapping[str, float | None]
    latency: float | None
    computing: Mapping[str, float | None]


@dataclass(frozen=True)
class Need:
    """A link in a step of training, or of decoding. None: not counted, not known, or not asked.

    `bytes` are those of the busier direction, of a whole node on the network and else of `rank`, which moves most;
    `of_rank` are the rank's own. `needed` and `bandwidth` are bytes a second. `at_best` and `hidden` are seconds.
    """

    link: str
    rank: int
    calls: float
    of_rank: float | None
    bytes: float | None
    needed: float | None
    bandwidth: float | None
    at_best: float | None
    hidden: float | None

    @property
    def share(self) -> float | None:
        """The part of the bandwidth that is needed. Above 1 the link bounds the step."""
        return over(self.needed, self.bandwidth)

    @property
    def shown(self) -> float | None:
        """Seconds that cannot be hidden, at least."""
        return None if self.at_best is None or self.hidden is None else self.at_best - self.hidden

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "share": self.share, "not_hidden": self.shown}


def machine(
    hardware: "Hardware | None", network: "Network | None", computing: Mapping[str, float | None]
) -> Machine:
    """The machine of these pages."""
    rates: dict[str, float | None] = {}
    if hardware is not None:
        rates = {hardware.link_kind or "": hardware.between, PCIE: hardware.to_host}
    if network is not None:
        rates[NETWORK] = network.of_node
    return Machine(rates, None if network is None else network.latency, computing)


def needs(record: Record, machine: Machine, seconds: float | None = None) -> list[Need]:
    """Each link of a step, for the rank or node that moves most on it, the one with most bytes first.

    `seconds` are those that the step shall take. In inference a step is one of decoding: a token of each sequence.
    Empty where no traffic is counted, or no decoding.
    """
    found: dict[str, Need] = {}
    for rank in record.ranks:
        steps = transfers.decoding_steps(rank) if record.mode == "infer" else 1
        rows = transfers.of_step(record, rank)
        if rows is None or not steps:
            continue
        if record.mode == "infer":
            rows = [each for each in rows if each.phase == "decode"]
        for link in dict.fromkeys(each.link or transfers.UNKNOWN for each in rows):
            own = [each for each in rows if (each.link or transfers.UNKNOWN) == link]
            place = _place(record, rank) if link == NETWORK else ALONE
            need = _need(link, rank.rank, own, place, machine, seconds, steps)
            if link not in found or (need.bytes or 0) > (found[link].bytes or 0):
                found[link] = need
    return sorted(found.values(), key=lambda need: -(need.bytes or 0))


def _need(
    link: str,
    rank: int,
    rows: list[Transfer],
    place: "Place | None",
    machine: Machine,
    seconds: float | None,
    steps: int,
) -> Need:
    phases = dict.fromkeys(each.phase for each in rows)
    by_phase = {name: [each for each in rows if each.phase == name] for name in phases}
    whole = [flow(own, place) for own in by_phase.values()]
    alone = [flow(own, ALONE) for own in by_phase.values()]
    bandwidth = machine.rates.get(link)
    latency = (machine.latency or 0) if link == NETWORK else 0

    def at_best(own: list[Transfer]) -> float | None:
        total = flow(own, place)
        moving = over(None if total is None else total.busier, bandwidth)
        return None if moving is None else (moving + sum(each.calls for each in own) * latency) / steps

    def hidden(name: str) -> float | None:
        own = [each for each in by_phase[name] if each.operation in MAY_HIDE.get(name, ())]
        if not own:
            return 0.0
        taken, beside = at_best(own), machine.computing.get(name)
        return None if taken is None or beside is None else min(taken, beside / steps)

    nbytes = sum_or_none(None if each is None else each.busier / steps for each in whole)
    return Need(
        link,
        rank,
        sum(each.calls for each in rows) / steps,
        sum_or_none(None if each is None else each.busier / steps for each in alone),
        nbytes,
        over(nbytes, seconds),
        bandwidth,
        sum_or_none(map(at_best, by_phase.values())),
        sum_or_none(map(hidden, by_phase)) if bandwidth is not None else None,
    )


def sum_or_none(figures: Iterable[float | None]) -> float | None:
    """The sum. None where one of them is."""
    values = [*figures]
    return None if any(each is None for each in values) else sum((each or 0 for each in values), 0.0)


def over(amount: float | None, rate: float | None) -> float | None:
    """`amount` over `rate`. None where one of them is, and where a page's rate is none that a link has."""
    ratio = None if amount is None or not rate else amount / rate
    return None if ratio is None or not math.isfinite(ratio) else ratio


class Place(NamedTuple):
    """A rank, the `node` of ranks on which it is, and those of its pipeline stage."""

    rank: int
    node: range
    stage: range

    @property
    def peers(self) -> int:
        """The ranks of the stage on the node: each sends as many messages as this one."""
        return len(range(max(self.node.start, self.stage.start), min(self.node.stop, self.stage.stop)))


ALONE = Place(0, range(1), range(1))
"""A rank that shares its link with no other."""


def _place(record: Record, rank: Rank) -> Place | None:
    per_node, size = record.value("world.per_node"), record.world.size
    stages = record.value("pipeline.stages")
    if not isinstance(per_node, int) or per_node < 1 or rank.rank >= size:
        return None
    first = rank.rank // per_node * per_node
    each = max(1, size // stages) if isinstance(stages, int) and stages > 0 else size
    start = rank.rank // each * each
    return Place(rank.rank, range(first, min(first + per_node, size)), range(start, start + each))


def flow(rows: Iterable[Transfer], place: Place | None = ALONE) -> Flow | None:
    """What `rows` of the rank at `place`, and of those like it, move out of its node and into it. None: not known."""
    total = Flow()
    for each in rows:
        message = each.operation in ("send", "receive")
        rings = None if place is None else place.peers if message else shared(each.group, place)
        one_way = each.operation in (*INTO, *OUT)
        nbytes = each.bytes if one_way else each.by_ring
        if nbytes is None or rings is None:
            return None
        out = 0 if each.operation in INTO else nbytes * rings
        into = 0 if each.operation in OUT else nbytes * rings
        total = Flow(total.out + out, total.into + into)
    return total


def shared(group: str, place: Place) -> float | None:
    """How many groups of the kind of `group`, which has the rank, have ranks on its node. None: not known."""
    if place == ALONE:
        return 1
    try:
        members = transfers.members(group)
    except ValueError:
        return None
    ranks = members if isinstance(members, range) else frozenset(members)
    there = sum(number in ranks for number in place.node)
    return len(place.node) / there if there else None


Counted = tuple[float, float, float]
"""A batch, and of a decoding step with it the bytes on a link and the bytes in a device's memory."""


def turn(one: Counted, other: Counted, link: float, memory: float, waiting: float = 0.0) -> float:
    """The batch from which a link, and no longer memory, bounds a decoding step; infinite where none does.

    `link` and `memory` are bytes a second, `waiting` the seconds of a step's calls x latency. A step of B sequences
    takes waiting + B w / link on the link and (W + B k) / memory in memory: W are the bytes of the weights, w and k
    those of each sequence on the link and in memory. So it is (W / memory - waiting) / (w / link - k / memory), where w
    / link is more than k / memory. Both are linear in the batch, so the counts of two batches give it. Of t ranks that
    share each layer, W and k are a t-th of the model's, and w grows with 2 (t - 1) / t.
    """
    late = waiting * link
    return crossing((one[0], one[1] + late, one[2]), (other[0], other[1] + late, other[2]), link / memory)
