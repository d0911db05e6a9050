"""How long a step waits for what its ranks send each other, by the efficiencies of links that others measured.

A collective takes the bytes that a rank sends by ring, over the link's rate, over the efficiency of calls of its mean
size in a group of its size. One that is smaller than any row takes as long as the smallest with rows; at best, no time
but that of its bytes. On the network all ranks of the nodes must be in the group, as in the rows.

What `MAY_HIDE` in a phase hides, at best, behind all that its operators compute, and at worst not at all: these are the
limits. The seconds are halfway between the two. A transfer without rows that takes at most `LITTLE` of the step counts
as operators without rows do. Stages of a pipeline also wait for each other's work, so a step of them has no estimate.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from harness.analysis.moves import transfers
from harness.analysis.moves.links_model import MAY_HIDE, Place, over, shared
from harness.analysis.speed.efficiency import FAMILY, KINDS, PER_NODE, SIZES, Fit, LinkEfficiency, committed
from harness.analysis.speed.estimate import LITTLE, Estimate, Interval, together
from harness.analysis.speed.roofline_model import PHASES, Bound
from harness.record.links import NETWORK, by_ring
from harness.record.memory import Rank, Transfer
from harness.record.schema import Record


class Unknown(Exception):
    """Why there is no estimate, as a clause."""


class Known(NamedTuple):
    """Bytes a second of each link in each direction, of a node on the network; the chip; the ranks of a node; the fit;
    and the estimated seconds of each phase.
    """

    rates: Mapping[str, float | None]
    chip: str | None
    per_node: int | None
    fit: Fit
    phases: Mapping[str, Interval]


def of_step(
    record: Record,
    phases: Sequence[Bound],
    rates: Mapping[str, float | None],
    page: str,
    fit: Fit | None = None,
) -> Estimate:
    """The seconds that no computing hides, of the rank that waits longest.

    `phases` are those of the step, and `page` is the hardware whose links have these `rates`.
    """
    computing = {each.phase: each.estimate.interval for each in phases}
    known = Known(
        rates,
        FAMILY.get(page),
        _per_node(record),
        fit or committed(),
        {name: interval for name, interval in computing.items() if interval is not None},
    )
    if len(known.phases) < len(computing):
        return Estimate(None, "a phase has none")
    try:
        each_rank = [_of_rank(record, rank, known) for rank in record.ranks]
    except Unknown as why:
        return Estimate(None, str(why))
    return Estimate(max(each_rank, key=lambda interval: interval.high))


def _per_node(record: Record) -> int | None:
    value = record.value("world.per_node")
    return value if isinstance(value, int) else None


def _of_rank(record: Record, rank: Rank, known: Known) -> Interval:
    rows = transfers.of_step(record, rank)
    if rows is None:
        raise Unknown(f"what ranks send is not in the record: {transfers.missing(record)}")
    if gaps := transfers.gaps(rank):
        raise Unknown(f"not all that ranks send was counted: {gaps[0]}")
    if record.mode == "infer" and len({each.step for each in rank.phases if each.phase == "prefill"}) > 1:
        raise Unknown("it has several batches, and what ranks send is that of the last")
    if any(each.operation in ("send", "receive") for each in rows):
        raise Unknown("its stages wait for each other, and nothing says how long")
    names = PHASES.get(record.mode, ())
    return together([_of_phase(name, [each for each in rows if each.phase == name], known) for name in names])


def _of_phase(name: str, rows: Sequence[Transfer], known: Known) -> Interval:
    """What of a phase's transfers cannot be hidden at best, and all of them; the mean of the two."""
    hides = MAY_HIDE.get(name, ())
    parts = [(each.operation in hides, part) for each in rows if (part := _of_row(each, known)) is not None]
    behind = together([part for may_hide, part in parts if may_hide])
    waited = together([part for may_hide, part in parts if not may_hide])
    computing = known.phases.get(name, Interval(0, 0, 0))
    shown = max(0.0, behind.seconds - computing.seconds)
    return Interval(
        waited.seconds + (behind.seconds + shown) / 2,
        waited.low + max(0.0, behind.low - computing.low),
        waited.high + behind.high,
    )


def _of_row(row: Transfer, known: Known) -> Interval | None:
    """The seconds of a row of transfers, all of them one after the other. None: it has none."""
    wire = row.bytes if row.by_ring is None else row.by_ring
    if not row.calls or not wire:
        return None
    if row.link is None:
        raise Unknown("the record does not say on which nodes its ranks are; world.per_node= says it")
    rate = known.rates.get(row.link)
    best = over(wire, rate)
    if rate is None or best is None:
        option = "--network NAME" if row.link == NETWORK else "--hardware NAME"
        raise Unknown(f"no page says how fast its {row.link} is; {option} gives one")
    try:
        efficiency = _efficiency(row, known)
    except Unknown:
        if best > LITTLE * together([*known.phases.values()]).seconds:
            raise
        return Interval(best, best, best / known.fit.worst)
    if row.bytes < efficiency.least * row.calls:
        each = by_ring(row.operation, round(efficiency.least), row.ranks)
        assert each is not None
        seconds = row.calls * each / rate / efficiency.share
        return Interval(max(best, seconds), best, max(best, seconds * efficiency.high))
    seconds = best / efficiency.share
    return Interval(seconds, seconds * efficiency.low, seconds * efficiency.high)


def _efficiency(row: Transfer, known: Known) -> LinkEfficiency:
    """The efficiency of calls of this size in such a group. Raises Unknown if there are no rows of them."""
    what = f"{row.operation} on {row.link}"
    kind = KINDS.get(row.operation)
    of_kind = [each for each in known.fit.links if (each.link, each.kind) == (row.link, kind)]
    if not of_kind:
        raise Unknown(f"there are no rows of {what} to go by")
    if row.link == NETWORK:
        if known.per_node != PER_NODE or _rings(row) != 1:
            raise Unknown(
                f"the rows of {what} are of all ranks of nodes of {PER_NODE}, and its groups are not"
            )
    elif not any(known.chip in each.chips for each in of_kind):
        raise Unknown(f"there are no rows of {what} on this GPU to go by")
    of_group = [each for each in of_kind if each.fewest <= row.ranks <= each.largest]
    if not of_group:
        raise Unknown(
            f"there are rows of {what} in groups of {_spans(of_kind)} ranks, and none of {row.ranks:,}"
        )
    size = max(row.bytes / row.calls, SIZES[0])
    found = next((each for each in of_group if each.least <= size < each.most), None)
    if found is None:
        raise Unknown(f"there are no rows of {what} of {size:,.0f} bytes a call to go by")
    return found


def _rings(row: Transfer) -> float | None:
    """How many groups of the kind of this row's have ranks on the node of its first rank."""
    try:
        members = transfers.members(row.group)
    except ValueError:
        return None
    if not members:
        return None
    first = members[0] // PER_NODE * PER_NODE
    node = range(first, first + PER_NODE)
    return shared(row.group, Place(members[0], node, node))


def _spans(efficiencies: Sequence[LinkEfficiency]) -> str:
    def texts() -> Iterator[str]:
        for fewest, largest in sorted({(each.fewest, each.largest) for each in efficiencies}):
            yield f"{fewest}" if fewest == largest else f"{fewest} to {largest}"

    return ", ".join(texts())
