"""What bounds a run: each phase's counted work against the machine's peak rates. It reads records and imports no torch.

Williams et al. 2009, "Roofline": work of F FLOPs that moves M bytes takes max(F / peak, M / bandwidth) seconds or more.
Memory bounds it where its intensity F / M is below the machine's balance, peak / bandwidth.

A forward call of B sequences does B f FLOPs and moves W + B k bytes: W are the bytes of the weights, k the bytes that
each sequence moves for itself. So at a balance of b FLOP/B the crossover batch is b W / (f - b k). There is none where
a sequence's own intensity f / k is below b. In a decode, f and k grow with the context: each position adds its share.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.analysis.run_settings import settings_in
from harness.analysis.speed.estimate import Estimate, of_phase, of_step
from harness.record.memory import Phase, Rank, Work
from harness.record.results import Ceilings
from harness.record.schema import Record

if TYPE_CHECKING:
    from harness.config.settings import Settings

PHASES = {"train": ("forward", "backward", "step"), "infer": ("prefill", "decode")}
"""The phases of a training step, and of a batch of inference."""

WEIGHTS = {"forward": 1, "prefill": 1, "decode": 1, "backward": 2}
"""How often a call moves all weights. A backward reads them, and writes gradients of the same size."""

COPIES = {"dynamic": 3, "static": 1}
"""How often a new token moves each cached position. A dynamic cache is copied (read and written), then read."""


NO_ESTIMATE = Estimate(None)


class Total(NamedTuple):
    """A phase's work in one step, summed over its micro-batches; by class of operators, where that was recorded."""

    flops: int
    moved: int
    forward_calls: int
    work: dict[str, Work] | None


@dataclass(frozen=True)
class Shape:
    """How the work of a forward call depends on its batch: `batch` sequences, and `weights` in bytes.

    In a decode each sequence attends to `context` positions on average. Each position takes `position_flops` FLOPs, and
    its `position_bytes` are moved `copies` times.
    """

    batch: float
    weights: float
    context: float = 0.0
    position_flops: float = 0.0
    position_bytes: float = 0.0
    copies: int = 1


@dataclass(frozen=True)
class Turn:
    """The crossover: the batch and the context at which the other side would bound a phase. None: there is none."""

    batch: float | None
    context: float | None = None  # tokens, at the run's own batch
    longest: float | None = None  # the longest context, in tokens, at which some batch is compute-bound
    own: float | None = None  # FLOP/B of what each sequence moves for itself


@dataclass(frozen=True)
class Bound:
    """A phase, or a whole step, against the machine. None: not counted, not measured, or not known."""

    phase: str
    flops: int | None
    moved: int | None
    ceilings: Ceilings
    at_best: float | None
    seconds: float | None = None
    mbu: float | None = None
    turn: Turn | None = None
    estimate: Estimate = NO_ESTIMATE

    @property
    def intensity(self) -> float | None:
        """FLOPs for each byte moved."""
        return self.flops / self.moved if self.flops is not None and self.moved else None

    @property
    def times(self) -> float | None:
        """The time to compute, divided by the time to move the bytes."""
        balance = self.ceilings.balance
        return self.intensity / balance if self.intensity is not None and balance else None

    @property
    def by(self) -> str | None:
        """What bounds it: "compute" or "memory"."""
        return None if self.times is None else "compute" if self.times >= 1 else "memory"

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: FLOPs done, divided by the peak FLOPs in its seconds."""
        if self.flops is None or not self.seconds or not self.ceilings.flops:
            return None
        return self.flops / self.seconds / self.ceilings.flops

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "phase": self.phase,
            "flops": self.flops,
            "moved": self.moved,
            "intensity": self.intensity,
            "balance": self.ceilings.balance,
            "at_best_seconds": self.at_best,
            "estimate": None if self.estimate.interval is None else self.estimate.interval._asdict(),
            "no_estimate": self.estimate.why or None,
            "seconds": self.seconds,
            "mfu": self.mfu,
            "mbu": self.mbu,
            "bound": self.by,
            "times": self.times,
            "turns": None if self.turn is None else asdict(self.turn),
        }


def bounds(record: Record, ceilings: Ceilings | None = None, timed: bool = True) -> list[Bound]:
    """Each phase of `record`, then the whole step, against `ceilings`; the default is the run's own machine.

    The work is that of the rank with the most work, in the last counted training step or the largest batch of
    inference. The seconds are the slowest rank's; with `timed=False` there are none. A step of several ranks has no
    estimate here: `communication.py` has what they send. Empty where nothing was counted.
    """
    ceilings = ceilings or record.limits
    names = PHASES.get(record.mode, ())
    counted = [(rank, totals) for rank in record.ranks if (totals := _totals(record, rank, names))]
    if not counted:
        return []

    def least(totals: Mapping[str, Total]) -> float:
        return sum(ceilings.at_best(each.flops, each.moved) or each.flops for each in totals.values())

    rank, totals = max(counted, key=lambda pair: least(pair[1]))
    seconds_of = {each.phase: each.seconds for each in record.performance.phases or ()} if timed else {}
    settings = settings_in(record)
    phases = []
    for name in totals:
        shape = None if settings is None else _shape(record, rank, settings, name, totals)
        bound = _bound(name, totals[name], ceilings, seconds_of.get(name), shape)
        phases.append(replace(bound, estimate=_estimate(record, totals[name], ceilings)))
    whole = of_step([each.estimate for each in phases], record.world.size, None)
    return [*phases, replace(_whole(record.mode, phases, ceilings), estimate=whole)]


def _estimate(record: Record, total: Total, ceilings: Ceilings) -> Estimate:
    if record.world.device != "cuda":
        return Estimate(None, "its operators are a CPU's; a rehearsal with hardware=NAME has a GPU's")
    return of_phase(total.work, ceilings)


def _totals(record: Record, rank: Rank, names: Sequence[str]) -> dict[str, Total]:
    """The work of each phase in the last training step or the largest batch; empty where no step has all phases."""
    steps: dict[int, dict[str, list[Phase]]] = {}
    for phase in rank.phases:
        if phase.phase in names:
            steps.setdefault(phase.step, {}).setdefault(phase.phase, []).append(phase)
    complete = []
    for by_name in steps.values():
        totals = {name: total for name in names if (total := _total(by_name.get(name, []))) is not None}
        if len(totals) == len(names) or (record.mode == "infer" and totals and len(by_name) == len(totals)):
            complete.append(totals)
    if record.mode == "train" or not complete:
        return complete[-1] if complete else {}
    return max(complete, key=lambda totals: sum(total.flops for total in totals.values()))


def _total(phases: Sequence[Phase]) -> Total | None:
    if not phases or any(each.flops is None or each.moved is None for each in phases):
        return None
    return Total(
        sum(each.flops or 0 for each in phases),
        sum(each.moved or 0 for each in phases),
        sum(each.passes or 0 for each in phases),
        None if any(each.work is None for each in phases) else _by_class(phases),
    )


def _by_class(phases: Sequence[Phase]) -> dict[str, Work]:
    """The work of all `phases`, by class of operators."""
    parts: dict[str, list[Work]] = {}
    for phase in phases:
        for name, part in (phase.work or {}).items():
            parts.setdefault(name, []).append(part)
    return {
        name: Work(
            flops=sum(each.flops for each in work),
            read=sum(each.read for each in work),
            written=sum(each.written for each in work),
            calls=sum(each.calls for each in work),
        )
        for name, work in parts.items()
    }


def _bound(name: str, total: Total, ceilings: Ceilings, seconds: float | None, shape: Shape | None) -> Bound:
    at_best = ceilings.at_best(total.flops, total.moved)
    mbu = crossover = None
    if shape is not None and total.forward_calls:
        crossover = _crossover(total, ceilings, shape)
        if name == "decode" and seconds and ceilings.bandwidth:
            needed = shape.weights + shape.batch * shape.context * shape.position_bytes
            mbu = needed * total.forward_calls / seconds / ceilings.bandwidth
    return Bound(name, total.flops, total.moved, ceilings, at_best, seconds, mbu, crossover)


def _whole(mode: str, phases: Sequence[Bound], ceilings: Ceilings) -> Bound:
    def sum_or_none(figures: Iterator[Any]) -> Any:
        values = list(figures)
        return None if None in values else sum(values)

    return Bound(
        "a step" if mode == "train" else "a batch",
        sum_or_none(each.flops for each in phases),
        sum_or_none(each.moved for each in phases),
        ceilings,
        sum_or_none(each.at_best for each in phases),
        sum_or_none(each.seconds for each in phases),
    )


def _crossover(total: Total, ceilings: Ceilings, shape: Shape) -> Turn | None:
    """The crossover of a forward call; None where the counted bytes do not fit the model of such a call."""
    balance = ceilings.balance
    flops = total.flops / total.forward_calls / shape.batch
    own = (total.moved / total.forward_calls - shape.weights) / shape.batch
    if balance is None or own <= 0 or not flops:
        return None
    gain = flops - balance * own
    batch = balance * shape.weights / gain if gain > 0 else None
    if not shape.context:
        return Turn(batch, own=flops / own)
    costs = balance * shape.copies * shape.position_bytes - shape.position_flops
    if costs <= 0:
        return Turn(batch, own=flops / own)
    without = gain + costs * shape.context  # the gain of a sequence with no context
    context = (without - balance * shape.weights / shape.batch) / costs
    return Turn(
        batch, context if context > 0 else None, without / costs if without > 0 else None, flops / own
    )


def _shape(
    record: Record, rank: Rank, settings: "Settings", name: str, totals: Mapping[str, Total]
) -> Shape | None:
    """The shape of a forward call in phase `name`; None where the record lacks a figure for it."""
    matrices = record.model.matrices
    if name not in WEIGHTS or matrices is None:
        return None
    tensor_parallel = settings.generation.tensor_parallel if record.mode == "infer" else 1
    split = record.pipeline.split
    share = (
        split[rank.stage] / sum(split) if rank.stage < len(split) and any(split) else 1.0
    ) / tensor_parallel
    weights = WEIGHTS[name] * matrices * share
    if record.mode == "train":
        return Shape(settings.train.micro_batch, weights)
    inference, generation = record.inference, settings.generation
    groups = totals["prefill"].forward_calls if "prefill" in totals else 0
    dp_size = settings.layout(record.world.size).dp_size
    if not inference.prompts or inference.prompt_tokens is None or not groups or not dp_size:
        return None
    if generation.batching == "continuous":
        return None  # each forward call has another batch
    batch = min(generation.batch, -(-inference.prompts // dp_size)) / groups
    if name != "decode" or generation.cache == "none":
        return Shape(batch, weights)
    flops, position = inference.attention_flops_per_position, inference.kv_bytes_per_token
    if generation.cache not in COPIES or flops is None or position is None:
        return None
    prompt, tokens = inference.prompt_tokens / inference.prompts, totals["decode"].forward_calls / groups
    return Shape(
        batch,
        weights,
        prompt + (tokens if generation.cache == "static" else (tokens + 1) / 2),
        flops * share,
        position * share,
        COPIES[generation.cache],
    )
