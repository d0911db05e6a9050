"""Chooses the representative ranks of a world: those that are rehearsed, and the equivalent ranks of each.

Every stage of a pipeline has its own layers, and keeps as many micro-batches as there are stages from it to the last.
So each stage is rehearsed, and the rest of this text is about the ranks of one stage. Where only the highest peak
matters, a middle stage is left out if an earlier middle stage has the same layers.

With ZeRO-0 and 3 all ranks are equivalent, but for what they do for Muon (`muon_shares.py`). Where ZeRO-3's shards are
uneven, the last rank copies no padding, and so moves a few bytes less than its representative.

With ZeRO-1 and 2 a rank copies the gradients of the parameters in its partition into a buffer of their full size. The
buffer is allocated when the first of them is reduced. ZeRO-2 reduces during backward, from the last parameter to the
first; ZeRO-1 reduces after backward, from the first to the last. In both cases memory falls meanwhile, so a larger and
earlier buffer gives a higher peak: a rank whose buffer is at least as large and at least as early as another's peaks
no lower.

With an offloaded optimizer there is no such buffer: pieces of gradients are copied and the whole gradients freed. Then
a rank surely peaks no lower only if it has at least as much of each of the same parameters.

Only the ranks that no other rank dominates are rehearsed.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch

from harness.config.load import Settings
from harness.data import prompts
from harness.generation.generation_config import strategy_of
from harness.generation.infer import batches, of_replica
from harness.model import adapter, init_weights
from harness.model.plan import Plan
from harness.model.stage import layer_kinds, parts
from harness.model.tokenizer import tokenizer_of
from harness.rehearsal import muon_shares

Key = TypeVar("Key", bound=Hashable)

EXPORTS = "it alone exports the model"

ALIGNMENT = 2
"""ZeRO-1 and 2: each rank's partition is a multiple of so many elements (DeepSpeed's nccl_start_alignment_factor)."""


@dataclass(frozen=True)
class Representative:
    """The representative `rank`, which is rehearsed.

    `equivalent_ranks` have the same bytes, itself included. The ranks in `bounds` peak no higher.
    `why` says how it differs from the other representatives; it is empty where it does not.
    """

    rank: int
    equivalent_ranks: tuple[int, ...]
    bounds: tuple[int, ...] = ()
    why: str = ""
    size: int = 0
    """Elements of the parameters in its partition, or tokens of its largest batch; more of them means more bytes."""
    stage: int = 0
    dominated: bool = False
    """Whether a representative of an earlier stage peaks at least as high."""

    def at(self, stage: int, ranks_per_stage: int, place: str, dominated: bool) -> "Representative":
        """A copy of this representative of stage 0 for a later `stage`: each rank moves up by the ranks before it."""
        first = stage * ranks_per_stage
        return Representative(
            self.rank + first,
            tuple(rank + first for rank in self.equivalent_ranks),
            tuple(rank + first for rank in self.bounds),
            "; ".join(part for part in (place, self.why) if part),
            self.size,
            stage,
            dominated,
        )


def representatives_of(plan: Plan) -> list[Representative]:
    """The representative ranks. Raises Refusal where the model cannot be cut into so many stages."""
    settings, layout = plan.settings, plan.layout
    stages, dp_size = layout.stages, layout.dp_size
    exports = settings.train.export and settings.train.steps < settings.ledger.steps
    stage_cuts = _cut(plan) if stages > 1 or _sharded(settings, dp_size) else []
    shares = _shares(plan) if settings.mode == "infer" else []
    representatives = []
    for stage in range(stages):
        exporting_stage = exports and stage == 0
        if settings.mode == "infer":
            pieces = _pieces(plan)
            keys = [(batches, piece) for batches in shares for piece in pieces]
            of_stage = _group_equal(
                keys, partial(_share_reason, len(set(shares)) > 1), lambda key: _largest_batch(key[0])
            )
        elif _sharded(settings, dp_size):
            partitions = _partitions(stage_cuts[stage].sizes, settings.zero.stage, dp_size)
            of_stage = _undominated(partitions, exporting_stage, settings.zero.offload != "none")
        else:
            exports_model = [exporting_stage and replica == 0 for replica in range(dp_size)]
            muon = settings.optimizer.kind == "muon" and settings.zero.stage == 3
            work = muon_shares.shares(plan) if muon and settings.mode == "train" else [None] * dp_size
            of_stage = _group_equal([*zip(exports_model, work, strict=True)], _replica_reason)
        place = f"stage {stage} of {stages}, layers {stage_cuts[stage].layers}" if stages > 1 else ""
        repeated = stage < stages - 1 and any(
            stage_cuts[stage].kinds == each.kinds for each in stage_cuts[1:stage]
        )
        representatives += [
            representative.at(stage, len(layout.of_stage(stage)), place, repeated)
            for representative in of_stage
        ]
    return representatives


def _replica_reason(key: tuple[bool, muon_shares.Share | None]) -> str:
    exporter, share = key
    orthogonalizes = f"it orthogonalizes {share.matrices} matrices" if share is not None else ""
    return "; ".join(part for part in (EXPORTS if exporter else "", orthogonalizes) if part)


def _sharded(settings: Settings, dp_size: int) -> bool:
    """Whether ranks with the same parameters have different partitions of optimizer state or gradients."""
    return settings.mode == "train" and settings.zero.stage in (1, 2) and dp_size > 1


class Cut(NamedTuple):
    """A stage of the model, or the whole model if there is only one stage."""

    sizes: list[int]  # elements of each parameter that is trained, in the model's order
    kinds: list[Hashable]  # the kind of each layer
    layers: str  # the range of its layers, as text


def _cut(plan: Plan) -> list[Cut]:
    """The stages of the model."""
    whole = adapter.outline(plan.settings, plan.config, torch.bfloat16)
    if plan.layout.stages == 1:
        return [Cut(_trained(whole.parameters()), [], "")]
    kinds = layer_kinds(whole)
    return [
        Cut(
            _trained(part.values()),
            kinds[layers.start : layers.stop],
            f"{layers.start} to {layers.stop - 1}",
        )
        for part, layers in zip(parts(whole, plan.split), plan.layers, strict=True)
    ]


def _trained(parameters: Iterable[torch.Tensor]) -> list[int]:
    """Elements of each parameter that is trained: those alone have gradients and optimizer state to share."""
    return [parameter.numel() for parameter in parameters if parameter.requires_grad]


def _group_equal(
    keys: Sequence[Key], why: Callable[[Key], str], size_of: Callable[[Key], int] = lambda key: 0
) -> list[Representative]:
    """One representative for each distinct key. `keys` has one key a rank; equal keys mean equivalent ranks."""
    ranks: dict[Key, list[int]] = {}
    for rank, key in enumerate(keys):
        ranks.setdefault(key, []).append(rank)
    reason = why if len(ranks) > 1 else lambda key: ""
    return [
        Representative(equivalent[0], tuple(equivalent), why=reason(key), size=size_of(key))
        for key, equivalent in ranks.items()
    ]


class Batches(NamedTuple):
    """For each batch that the ledger sees, the tokens of each prompt and the most new tokens after it.

    `columns` is the cache's length in tokens where one cache serves all batches, else 0.
    """

    seen: tuple[tuple[tuple[int, int], ...], ...]
    columns: int = 0


def _largest_batch(batches: Batches) -> int:
    return max((len(batch) * (batches.columns or sum(_lengths(batch))) for batch in batches.seen), default=0)


def _lengths(batch: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The padded length of a batch's prompts, and its most new tokens."""
    return max(length for length, _ in batch), max(most for _, most in batch)


def _batches_reason(batches: Batches) -> str:
    sizes = (f"{len(batch)} x {_lengths(batch)[0]} tokens" for batch in batches.seen)
    cached = f", in a cache for {batches.columns}" if batches.columns else ""
    return f"its batches are {', '.join(sizes)}{cached}" if batches.seen else "no prompt"


Piece = tuple[tuple[int, int], ...]
"""For each length that ranks cannot cut evenly: the length, and the part of it that one rank has."""


def _pieces(plan: Plan) -> list[Piece]:
    """For each of the ranks that share a layer, its parts of the lengths that do not divide evenly."""
    ranks = plan.layout.tp_size
    if ranks == 1:
        return [()]
    whole = init_weights.outline(plan.config, torch.bfloat16)
    lengths = {length for parameter in whole.parameters() for length in parameter.shape if length % ranks}
    # torch's chunks: the last one is the remainder
    chunks = {length: -(-length // ranks) for length in sorted(lengths)}
    return [
        tuple((length, min(part, max(0, length - rank * part))) for length, part in chunks.items())
        for rank in range(ranks)
    ]


def _share_reason(batches_differ: bool, key: tuple[Batches, Piece]) -> str:
    """How a rank differs from others: by its batches, where `batches_differ`, and by its part of uneven lengths."""
    batches, piece = key
    reasons = [_batches_reason(batches)] if batches_differ else []
    if piece:
        reasons.append(
            "of what ranks cannot share evenly it has "
            + ", ".join(f"{own} of {length}" for length, own in piece)
        )
    return "; ".join(reasons)


def _shares(plan: Plan) -> list[Batches]:
    """The batches of each replica: the lengths of their prompts, and the most new tokens."""
    settings, config = plan.settings, plan.config
    tokenizer = tokenizer_of(settings.model, config, settings.data.tokenizer)
    strategy = strategy_of(settings, config)
    sampled = prompts.find(settings, tokenizer, strategy.max_new_tokens_after, read=False)
    lengths = [(len(prompt.tokens), prompt.max_new_tokens) for prompt in sampled]
    generation = settings.generation
    seen = settings.ledger.steps if generation.batching == "static" else None
    shares = []
    for dp_rank in range(plan.layout.dp_size):
        own_lengths = [lengths[number] for number in of_replica(len(lengths), dp_rank, plan.layout.dp_size)]
        all_batches = [tuple(batch) for batch in batches(own_lengths, generation.batch)]
        columns = max((sum(_lengths(batch)) for batch in all_batches), default=0) if generation.compile else 0
        shares.append(Batches(tuple(all_batches[:seen]), columns))
    return shares


@dataclass(frozen=True)
class Partition:
    """The properties of a rank's partition that decide its peak, in elements."""

    elements: int  # of all parameters with a part in the partition, whole
    moment: int  # how many other parameters are reduced before the first of them
    pieces: tuple[int, ...]  # the part of each of them that is in the partition
    first: int  # the index of the first of them in the model

    def dominates(self, other: "Partition", offloaded: bool) -> bool:
        """Whether the rank with this partition surely peaks no lower than the rank with `other`."""
        if offloaded:
            same = (self.first, len(self.pieces)) == (other.first, len(other.pieces))
            return same and all(
                own_piece >= other_piece
                for own_piece, other_piece in zip(self.pieces, other.pieces, strict=True)
            )
        return self.elements >= other.elements and self.moment <= other.moment

    def reason(self) -> str:
        """The sentence that says how a rank with this partition differs."""
        when = f"after {self.moment} others" if self.moment else "first"
        return f"the parameters in its partition have {self.elements:,} elements, and are reduced {when}"


def _partitions(sizes: Sequence[int], zero: int, dp_size: int) -> list[Partition]:
    """The partition of each replica; `sizes` are the elements of each parameter, `zero` is ZeRO's stage."""
    ends = list(accumulate(sizes))
    begins = [0, *ends[:-1]]
    length = -(-ends[-1] // (ALIGNMENT * dp_size)) * ALIGNMENT
    partitions, first = [], 0
    for start in range(0, dp_size * length, length):
        while first < len(ends) and ends[first] <= start:
            first += 1
        after = bisect_left(begins, start + length)
        pieces = tuple(
            min(ends[index], start + length) - max(begins[index], start) for index in range(first, after)
        )
        elements = ends[after - 1] - begins[first] if pieces else 0
        moment = len(ends) if not pieces else first if zero == 1 else len(ends) - after
        partitions.append(Partition(elements, moment, pieces, first))
    return partitions


def _undominated(
    partitions: Sequence[Partition], exports_model: bool, offloaded: bool
) -> list[Representative]:
    """The ranks that no other dominates, and rank 0 if it exports the model. Each bounds those that it dominates."""

    def dominating(rank: int) -> int | None:
        return next(
            (other for other in kept if partitions[other].dominates(partitions[rank], offloaded)), None
        )

    kept: list[int] = []
    for rank in sorted(
        range(len(partitions)), key=lambda rank: (-partitions[rank].elements, partitions[rank].moment)
    ):
        if dominating(rank) is None:
            kept.append(rank)
    if exports_model and 0 not in kept:
        kept.append(0)
    bounds: dict[int, list[int]] = {rank: [] for rank in kept}
    for rank in range(len(partitions)):
        if rank not in bounds:
            other = dominating(rank)
            assert other is not None
            bounds[other].append(rank)
    return [
        Representative(rank, (rank,), tuple(dominated), partitions[rank].reason(), partitions[rank].elements)
        for rank, dominated in sorted(bounds.items())
    ]
