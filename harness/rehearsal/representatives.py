"""Which ranks of a world must be rehearsed, and for whom each stands.

Every stage of a pipeline has its own layers, and keeps as many micro-batches as there are stages from it on: each is
rehearsed, and what follows holds of the ranks of one stage. Where only the highest peak is asked for, a stage between
the ends need not be, when an earlier one there has the same layers.

With ZeRO-0 and 3 every rank holds the same; where ZeRO-3's shards are uneven the last rank copies no padding, and
so moves a few bytes fewer than the rank that stands for it. With ZeRO-1 and 2 a rank copies the gradients of the
parameters that its partition touches into a buffer of their whole size, made when the first of them is reduced:
ZeRO-2 reduces within backward, from the last parameter to the first; ZeRO-1 after it, from the first to the last.
Either way memory falls as it goes, so more bytes, earlier, is a higher peak: of any two ranks one whose buffer is
as large and as early peaks no lower. Where the optimizer is offloaded there is no such buffer: pieces of gradients
are copied, whole ones let go, and only a rank with no less of the same parameters is sure to peak no lower. Only
the ranks that no other one outdoes are rehearsed.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch

from harness.config.load import Settings
from harness.data import prompts
from harness.generation.generation_config import strategy_of
from harness.generation.infer import batches
from harness.model import init_weights, loader
from harness.model.partition import ranges, split_of
from harness.model.stage import layer_kinds, parts
from harness.model.tokenizer import tokenizer_of

Key = TypeVar("Key", bound=Hashable)

EXPORTS = "it alone exports the model"

ALIGNMENT = 2
"""Elements of which each rank's partition is a multiple in ZeRO-1 and 2: DeepSpeed's nccl_start_alignment_factor."""


@dataclass(frozen=True)
class Role:
    """`rank` is rehearsed; `stands_for` hold the same bytes, itself among them, and `bounds` peak no higher than it.

    `why` is what sets it apart from the others: empty where nothing does.
    """

    rank: int
    stands_for: tuple[int, ...]
    bounds: tuple[int, ...] = ()
    why: str = ""
    held: int = 0
    """Elements that its partition touches, or tokens of its largest batch: with more, more bytes, or nearly."""
    stage: int = 0
    outdone: bool = False
    """Whether it peaks no higher than a role of an earlier stage."""

    def at(self, stage: int, replicas: int, told: str, outdone: bool) -> "Role":
        """It, of the first ranks, as that of a later stage."""
        first = stage * replicas
        return Role(
            self.rank + first,
            tuple(rank + first for rank in self.stands_for),
            tuple(rank + first for rank in self.bounds),
            "; ".join(part for part in (told, self.why) if part),
            self.held,
            stage,
            outdone,
        )


def roles(settings: Settings) -> list[Role]:
    """The ranks to rehearse. Raises Refusal where the model cannot be read, or cut into so many stages."""
    stages = settings.pipeline.stages
    apart = settings.tensor_parallel
    replicas = (settings.world.size or 1) // (stages * apart)
    exports = settings.train.export and settings.train.steps < settings.ledger.steps
    cut = _cut(settings) if stages > 1 or _sharded(settings, replicas) else []
    shares = _shares(settings, replicas) if settings.mode == "infer" else []
    found = []
    for stage in range(stages):
        leads = exports and stage == 0
        if settings.mode == "infer":
            pieces = _pieces(settings, apart)
            keys = [(batches, piece) for batches in shares for piece in pieces]
            within = _alike(
                keys, partial(_told_share, len(set(shares)) > 1), lambda key: _largest_batch(key[0])
            )
        elif _sharded(settings, replicas):
            partitions = _partitions(cut[stage].sizes, settings.zero.stage, replicas)
            within = _outdone(partitions, leads, settings.zero.offload != "none")
        else:
            leading = [leads and replica == 0 for replica in range(replicas)]
            within = _alike(leading, lambda first: EXPORTS if first else "")
        told = f"stage {stage} of {stages}, layers {cut[stage].told}" if stages > 1 else ""
        again = stage < stages - 1 and any(cut[stage].kinds == each.kinds for each in cut[1:stage])
        found += [role.at(stage, replicas * apart, told, again) for role in within]
    return found


def _sharded(settings: Settings, replicas: int) -> bool:
    """Whether ranks with the same parameters have different parts of what belongs to them."""
    return settings.mode == "train" and settings.zero.stage in (1, 2) and replicas > 1


class Cut(NamedTuple):
    """A stage, or the whole where there is one."""

    sizes: list[int]  # elements of its parameters, in the order in which it has them
    kinds: list[Hashable]  # what its layers are, in words that compare
    told: str  # their numbers


def _cut(settings: Settings) -> list[Cut]:
    """Each stage of the model."""
    config = loader.model_config(settings.model)
    whole = init_weights.outline(config, torch.bfloat16)
    if settings.pipeline.stages == 1:
        return [Cut([parameter.numel() for parameter in whole.parameters()], [], "")]
    split = split_of(settings, config)
    kinds = layer_kinds(whole)
    return [
        Cut(
            [parameter.numel() for parameter in part.values()],
            kinds[layers.start : layers.stop],
            f"{layers.start} to {layers.stop - 1}",
        )
        for part, layers in zip(parts(whole, split), ranges(split), strict=True)
    ]


def _alike(
    keys: Sequence[Key], why: Callable[[Key], str], held: Callable[[Key], int] = lambda key: 0
) -> list[Role]:
    """One role for each of `keys`, which say by rank what is held."""
    ranks: dict[Key, list[int]] = {}
    for rank, key in enumerate(keys):
        ranks.setdefault(key, []).append(rank)
    told = why if len(ranks) > 1 else lambda key: ""
    return [Role(same[0], tuple(same), why=told(key), held=held(key)) for key, same in ranks.items()]


class Batches(NamedTuple):
    """By batch, of those that are seen, the tokens of each prompt and the most that may follow it.

    `columns` are those of the largest of all batches where one cache is kept for every one, else 0.
    """

    seen: tuple[tuple[tuple[int, int], ...], ...]
    columns: int = 0


def _largest_batch(batches: Batches) -> int:
    return max((len(batch) * (batches.columns or sum(_room(batch))) for batch in batches.seen), default=0)


def _room(batch: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Columns of its prompts and of what follows."""
    return max(length for length, _ in batch), max(most for _, most in batch)


def _told_batches(batches: Batches) -> str:
    told = (f"{len(batch)} x {_room(batch)[0]} tokens" for batch in batches.seen)
    cached = f", in a cache for {batches.columns}" if batches.columns else ""
    return f"its batches are {', '.join(told)}{cached}" if batches.seen else "no prompt"


Piece = tuple[tuple[int, int], ...]
"""Of each length that ranks cannot cut evenly, which it is, and how much of it one of them has."""


def _pieces(settings: Settings, ranks: int) -> list[Piece]:
    """By rank of a group that shares each layer, what sets its part of a layer apart: all but the last have as much."""
    if ranks == 1:
        return [()]
    whole = init_weights.outline(loader.model_config(settings.model), torch.bfloat16)
    lengths = {length for parameter in whole.parameters() for length in parameter.shape if length % ranks}
    most = {
        length: -(-length // ranks) for length in sorted(lengths)
    }  # as torch cuts: the last has what is left
    return [
        tuple((length, min(part, max(0, length - rank * part))) for length, part in most.items())
        for rank in range(ranks)
    ]


def _told_share(apart: bool, key: tuple[Batches, Piece]) -> str:
    """What sets a rank apart: its batches, where they are `apart`, and its part of what is not cut evenly."""
    batches, piece = key
    told = [_told_batches(batches)] if apart else []
    if piece:
        told.append(
            "of what ranks cannot share evenly it has "
            + ", ".join(f"{mine} of {all_}" for all_, mine in piece)
        )
    return "; ".join(told)


def _shares(settings: Settings, size: int) -> list[Batches]:
    """By rank, the lengths of the prompts in its batches, and of what follows them."""
    tokenizer = tokenizer_of(settings.model, settings.data.tokenizer)
    strategy = strategy_of(settings, loader.model_config(settings.model))
    found = prompts.find(settings, tokenizer, strategy.most, rehearsed=True)
    lengths = [(len(prompt.tokens), prompt.most) for prompt in found]
    asked = settings.generation
    seen = settings.ledger.steps if asked.batching == "static" else None
    shares = []
    for rank in range(size):
        every = [tuple(batch) for batch in batches(lengths[rank::size], asked.batch)]
        columns = max((sum(_room(batch)) for batch in every), default=0) if asked.compile else 0
        shares.append(Batches(tuple(every[:seen]), columns))
    return shares


@dataclass(frozen=True)
class Partition:
    """What of a rank's partition decides its peak, in elements."""

    held: int  # of the parameters that it touches
    moment: int  # how many others are reduced before the first of them
    pieces: tuple[int, ...]  # of each of them, what is in the partition
    first: int  # the place of the first of them in the model

    def outdoes(self, other: "Partition", offloaded: bool) -> bool:
        """Whether the rank with it peaks no lower than the one with `other`."""
        if offloaded:
            same = (self.first, len(self.pieces)) == (other.first, len(other.pieces))
            return same and all(
                ours >= theirs for ours, theirs in zip(self.pieces, other.pieces, strict=True)
            )
        return self.held >= other.held and self.moment <= other.moment

    def reason(self) -> str:
        """It as what sets a rank apart."""
        when = f"after {self.moment} others" if self.moment else "first"
        return f"the parameters in its partition have {self.held:,} elements, and are reduced {when}"


def _partitions(sizes: Sequence[int], zero: int, replicas: int) -> list[Partition]:
    """Every replica's, of parameters with so many elements."""
    ends = list(accumulate(sizes))
    begins = [0, *ends[:-1]]
    length = -(-ends[-1] // (ALIGNMENT * replicas)) * ALIGNMENT
    found, first = [], 0
    for start in range(0, replicas * length, length):
        while first < len(ends) and ends[first] <= start:
            first += 1
        after = bisect_left(begins, start + length)
        pieces = tuple(
            min(ends[place], start + length) - max(begins[place], start) for place in range(first, after)
        )
        held = ends[after - 1] - begins[first] if pieces else 0
        moment = len(ends) if not pieces else first if zero == 1 else len(ends) - after
        found.append(Partition(held, moment, pieces, first))
    return found


def _outdone(partitions: Sequence[Partition], exports: bool, offloaded: bool) -> list[Role]:
    """The ranks that none outdoes, and rank 0 where it alone exports; each bounds those that it outdoes."""

    def outdoing(rank: int) -> int | None:
        return next((other for other in kept if partitions[other].outdoes(partitions[rank], offloaded)), None)

    kept: list[int] = []
    for rank in sorted(
        range(len(partitions)), key=lambda rank: (-partitions[rank].held, partitions[rank].moment)
    ):
        if outdoing(rank) is None:
            kept.append(rank)
    if exports and 0 not in kept:
        kept.append(0)
    bounds: dict[int, list[int]] = {rank: [] for rank in kept}
    for rank in range(len(partitions)):
        if rank not in bounds:
            other = outdoing(rank)
            assert other is not None
            bounds[other].append(rank)
    return [
        Role(rank, (rank,), tuple(outdone), partitions[rank].reason(), partitions[rank].held)
        for rank, outdone in sorted(bounds.items())
    ]
