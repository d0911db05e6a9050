"""What bounds a run: each phase's counted work against what its machine can do. It reads records, and no torch.

Williams et al. 2009, "Roofline": work of F operations that moves M bytes takes max(F / peak, M / bandwidth) at best. It
is bound by memory where its intensity F / M is below the machine's balance, peak / bandwidth.

A pass of B sequences does B f operations and moves W + B k bytes, W its weights' and k what each sequence moves for
itself. So the batch at which it turns, at a balance of b, is b W / (f - b k); where k's own intensity f / k is below b,
there is none. In a decode f and k grow with the context, by what attending to a position takes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from harness.config.load import Refusal, typed
from harness.config.settings import Settings
from harness.record.schema import Ceilings, Phase, Rank, Record

PHASES = {"train": ("forward", "backward", "step"), "infer": ("prefill", "decode")}
"""What a step of training, and a batch of inference, is made of."""

WEIGHTS = {"forward": 1, "prefill": 1, "decode": 1, "backward": 2}
"""How often a pass moves the weights as a whole: a backward reads them, and writes as much of gradients."""

COPIES = {"dynamic": 3, "static": 1}
"""How often a new token moves each cached position: a dynamic cache is read and written anew, then read."""


class Total(NamedTuple):
    """A phase's work in one step, over its micro-batches."""

    flops: int
    moved: int
    passes: int


@dataclass(frozen=True)
class Shape:
    """How a pass's work depends on its batch: `batch` sequences, and bytes of `weights`.

    In a decode each sequence attends to `context` positions in the mean, each for `position_flops` operations and of
    `position_bytes`, moved `copies` times.
    """

    batch: float
    weights: float
    context: float = 0.0
    position_flops: float = 0.0
    position_bytes: float = 0.0
    copies: int = 1


@dataclass(frozen=True)
class Turn:
    """Where a phase would be bound by the other side. None: nowhere."""

    batch: float | None
    context: float | None = None  # at this batch
    longest: float | None = None  # context at which any batch would be compute-bound
    own: float | None = None  # intensity of what each sequence moves for itself


@dataclass(frozen=True)
class Bound:
    """A phase, or the whole of a step, against the machine. None: not counted, not measured, or not known."""

    phase: str
    flops: int | None
    moved: int | None
    ceilings: Ceilings
    at_best: float | None
    seconds: float | None = None
    mbu: float | None = None
    turn: Turn | None = None

    @property
    def intensity(self) -> float | None:
        """Operations for each byte."""
        return self.flops / self.moved if self.flops is not None and self.moved else None

    @property
    def times(self) -> float | None:
        """How many times as long computing takes as moving."""
        balance = self.ceilings.balance
        return self.intensity / balance if self.intensity is not None and balance else None

    @property
    def by(self) -> str | None:
        """What bounds it."""
        return None if self.times is None else "compute" if self.times >= 1 else "memory"

    @property
    def mfu(self) -> float | None:
        """Operations done, of those that could have been done in its seconds."""
        if self.flops is None or not self.seconds or not self.ceilings.flops:
            return None
        return self.flops / self.seconds / self.ceilings.flops

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "phase": self.phase,
            "flops": self.flops,
            "moved": self.moved,
            "intensity": self.intensity,
            "balance": self.ceilings.balance,
            "at_best_seconds": self.at_best,
            "seconds": self.seconds,
            "mfu": self.mfu,
            "mbu": self.mbu,
            "bound": self.by,
            "times": self.times,
            "turns": None if self.turn is None else asdict(self.turn),
        }


def bounds(record: Record, ceilings: Ceilings | None = None, timed: bool = True) -> list[Bound]:
    """Each phase of `record`, then the whole, against its own machine or another.

    They are those of the rank with most to do, in the last step of training that was counted or the largest batch of
    inference; its seconds are the slowest rank's. Empty where nothing was counted. With `timed=False` no seconds count.
    """
    ceilings = ceilings or record.ceilings
    names = PHASES.get(record.mode, ())
    counted = [(rank, totals) for rank in record.ranks if (totals := _totals(record, rank, names))]
    if not counted:
        return []

    def least(totals: Mapping[str, Total]) -> float:
        return sum(ceilings.at_best(each.flops, each.moved) or each.flops for each in totals.values())

    rank, totals = max(counted, key=lambda pair: least(pair[1]))
    took = {each.phase: each.seconds for each in record.performance.phases or ()} if timed else {}
    settings = _settings(record)
    phases = []
    for name in totals:
        shape = None if settings is None else _shape(record, rank, settings, name, totals)
        phases.append(_bound(name, totals[name], ceilings, took.get(name), shape))
    return [*phases, _whole(record.mode, phases, ceilings)]


def _totals(record: Record, rank: Rank, names: Sequence[str]) -> dict[str, Total]:
    """The work of each phase in the step that counts; empty where there is none with all of them."""
    steps: dict[int, dict[str, list[Phase]]] = {}
    for phase in rank.phases:
        if phase.phase in names:
            steps.setdefault(phase.step, {}).setdefault(phase.phase, []).append(phase)
    whole = []
    for by_name in steps.values():
        totals = {name: total for name in names if (total := _total(by_name.get(name, []))) is not None}
        if len(totals) == len(names) or (record.mode == "infer" and totals and len(by_name) == len(totals)):
            whole.append(totals)
    if record.mode == "train" or not whole:
        return whole[-1] if whole else {}
    return max(whole, key=lambda totals: sum(total.flops for total in totals.values()))


def _total(phases: Sequence[Phase]) -> Total | None:
    if not phases or any(each.flops is None or each.moved is None for each in phases):
        return None
    return Total(
        sum(each.flops or 0 for each in phases),
        sum(each.moved or 0 for each in phases),
        sum(each.passes or 0 for each in phases),
    )


def _bound(name: str, total: Total, ceilings: Ceilings, seconds: float | None, shape: Shape | None) -> Bound:
    at_best = ceilings.at_best(total.flops, total.moved)
    mbu = turn = None
    if shape is not None and total.passes:
        turn = _turn(total, ceilings, shape)
        if name == "decode" and seconds and ceilings.bandwidth:
            needed = shape.weights + shape.batch * shape.context * shape.position_bytes
            mbu = needed * total.passes / seconds / ceilings.bandwidth
    return Bound(name, total.flops, total.moved, ceilings, at_best, seconds, mbu, turn)


def _whole(mode: str, phases: Sequence[Bound], ceilings: Ceilings) -> Bound:
    def added(figures: Iterator[Any]) -> Any:
        known = list(figures)
        return None if None in known else sum(known)

    return Bound(
        "a step" if mode == "train" else "a batch",
        added(each.flops for each in phases),
        added(each.moved for each in phases),
        ceilings,
        added(each.at_best for each in phases),
        added(each.seconds for each in phases),
    )


def _turn(total: Total, ceilings: Ceilings, shape: Shape) -> Turn | None:
    """Where a pass of `total` over its passes turns; None where its bytes are not those of such a pass."""
    balance = ceilings.balance
    flops = total.flops / total.passes / shape.batch
    own = (total.moved / total.passes - shape.weights) / shape.batch
    if balance is None or own <= 0 or not flops:
        return None
    gained = flops - balance * own
    batch = balance * shape.weights / gained if gained > 0 else None
    if not shape.context:
        return Turn(batch, own=flops / own)
    costs = balance * shape.copies * shape.position_bytes - shape.position_flops
    if costs <= 0:
        return Turn(batch, own=flops / own)
    without = gained + costs * shape.context  # of a sequence with no context
    here = (without - balance * shape.weights / shape.batch) / costs
    return Turn(batch, here if here > 0 else None, without / costs if without > 0 else None, flops / own)


def _settings(record: Record) -> Settings | None:
    """The config that ran; None where it is not one of this version's."""
    try:
        return typed(record.config) if record.config else None
    except Refusal:
        return None


def _shape(
    record: Record, rank: Rank, settings: Settings, name: str, totals: Mapping[str, Total]
) -> Shape | None:
    """The pass of phase `name`; None where the record does not say all of it."""
    matrices = record.model.matrices
    if name not in WEIGHTS or matrices is None:
        return None
    apart = settings.generation.tensor_parallel if record.mode == "infer" else 1
    split = record.pipeline.split
    share = (split[rank.stage] / sum(split) if rank.stage < len(split) else 1.0) / apart
    weights = WEIGHTS[name] * matrices * share
    if record.mode == "train":
        return Shape(settings.train.micro_batch, weights)
    told, asked = record.inference, settings.generation
    groups = totals["prefill"].passes if "prefill" in totals else 0
    replicas = record.world.size // (record.pipeline.stages * apart)
    if not told.prompts or told.prompt_tokens is None or not groups or not replicas:
        return None
    if asked.batching == "continuous":
        return None  # its batch is another one in every pass
    batch = min(asked.batch, -(-told.prompts // replicas)) / groups
    if name != "decode" or asked.cache == "none":
        return Shape(batch, weights)
    flops, position = told.attention_flops_per_position, told.kv_bytes_per_token
    if asked.cache not in COPIES or flops is None or position is None:
        return None
    prompt, tokens = told.prompt_tokens / told.prompts, totals["decode"].passes / groups
    return Shape(
        batch,
        weights,
        prompt + (tokens if asked.cache == "static" else (tokens + 1) / 2),
        flops * share,
        position * share,
        COPIES[asked.cache],
    )
