"""How long a phase will take, by the efficiencies that others reached, with its error. It imports no torch.

The seconds of a phase are the sum over classes of operators: at best, over the class's efficiency. So are its limits,
as if all classes were off in the same direction. Nothing is said of a machine, a dtype, a class or a size of calls
without rows. A class without rows that takes at most `LITTLE` of the time at best counts with the best and the worst
efficiency of any row.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from harness.analysis.speed.efficiency import EDGES, FAMILY, Amount, Efficiency, Fit, at_best, committed, size
from harness.record.memory import Work
from harness.record.results import Ceilings

LITTLE = 0.01


class Interval(NamedTuple):
    """Seconds, and the limits that held on rows left out."""

    seconds: float
    low: float
    high: float


class Estimate(NamedTuple):
    """An interval; or why there is none, as a clause."""

    interval: Interval | None
    why: str = ""


def of_phase(work: Mapping[str, Work] | None, ceilings: Ceilings, fit: Fit | None = None) -> Estimate:
    """The estimate of a phase with this work by class, on the machine of these ceilings."""
    fit = fit or committed()
    if why := _unfit(ceilings):
        return Estimate(None, why)
    if work is None:
        return Estimate(
            None, "the record does not say which operators did its work; one of this version does"
        )
    amounts = {
        name: Amount(each.flops, each.read + each.written, each.calls)
        for name, each in work.items()
        if each.calls and each.read + each.written
    }
    best = {name: at_best(name, amount, ceilings) for name, amount in amounts.items()}
    parts: list[Interval] = []
    for name, amount in amounts.items():
        efficiency = _efficiency(name, amount, ceilings, fit)
        if efficiency is not None:
            seconds = best[name] / efficiency.share
            parts.append(Interval(seconds, seconds * efficiency.low, seconds * efficiency.high))
        elif best[name] <= LITTLE * sum(best.values()):
            parts.append(Interval(best[name], best[name], best[name] / fit.worst))
        else:
            return Estimate(None, _unknown(name, amount, ceilings))
    interval = together(parts)
    calls = sum(amount.calls for amount in amounts.values())
    if calls * fit.launch > interval.seconds:
        return Estimate(
            None, f"its {calls:,} operators are small: to launch them takes longer than to run them"
        )
    return Estimate(interval)


def of_step(phases: Sequence[Estimate], ranks: int, communication: Estimate | None) -> Estimate:
    """The estimate of a whole step: all phases, then what of its communication no computing hides.

    `communication` is None where nobody asked for it: then only one rank has an estimate.
    """
    missing = next((each.why for each in phases if each.interval is None), None)
    if missing is not None:
        return Estimate(None, "a phase has none")
    known = [each.interval for each in phases if each.interval is not None]
    if ranks == 1:
        return Estimate(together(known))
    if communication is None:
        return Estimate(None, f"what {ranks} ranks send each other is not in it")
    if communication.interval is None:
        return communication
    return Estimate(together([*known, communication.interval]))


def together(intervals: Sequence[Interval]) -> Interval:
    """One after the other."""
    return (
        Interval(*(sum(figures) for figures in zip(*intervals, strict=True)))
        if intervals
        else Interval(0, 0, 0)
    )


def _unfit(ceilings: Ceilings) -> str:
    """Why nothing is known of this machine, as a clause; empty where something is."""
    if not ceilings.source:
        return "the record names no machine; --hardware NAME gives one"
    if ceilings.source not in FAMILY:
        return f"there are no rows of {ceilings.source} to go by, only of {', '.join(FAMILY)}"
    if not ceilings.flops or not ceilings.bandwidth:
        return f"there are no rows of {ceilings.dtype or 'its dtype'} to go by, only of 16 bits"
    return ""


def _efficiency(name: str, amount: Amount, ceilings: Ceilings, fit: Fit) -> Efficiency | None:
    """The efficiency of calls of this size, if there are rows of them and of this chip."""
    mean, chip = size(name, amount), FAMILY[ceilings.source]
    return next(
        (each for each in fit.classes.get(name, ()) if each.least <= mean < each.most and chip in each.chips),
        None,
    )


def _unknown(name: str, amount: Amount, ceilings: Ceilings) -> str:
    """Why the class of this name has no efficiency, as a clause."""
    least = EDGES.get(name, (0.0,))[0]
    if size(name, amount) < least:
        return f"its {name} operators are too small for the rows: {size(name, amount):,.0f} a call of {least:,.0f}"
    return f"there are no rows of {name} on {ceilings.source} to go by"
