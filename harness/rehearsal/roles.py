"""Which ranks of a world must be rehearsed, and for whom each stands.

With ZeRO-0 and 3 every rank holds the same. With ZeRO-1 and 2 a rank copies the gradients of the parameters that its
partition touches into a buffer of their whole size, made when the first of them is reduced: ZeRO-2 reduces within
backward, from the last parameter to the first; ZeRO-1 after it, from the first to the last. Either way memory falls as
it goes, so more bytes, earlier, is a higher peak: of any two ranks one whose buffer is as large and as early peaks no
lower. Where the optimizer is offloaded there is no such buffer: pieces of gradients are copied, whole ones let go, and
only a rank with no less of the same parameters is sure to peak no lower. Only the ranks that no other one outdoes are
rehearsed.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM

from harness import model, prompts
from harness.infer import batches
from harness.settings import Settings

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


def roles(settings: Settings) -> list[Role]:
    """The ranks to rehearse. Raises Refusal where the model cannot be read."""
    size = settings.world.size or 1
    if settings.mode == "infer":
        return _alike(_shares(settings, size), _told_batches, _largest_batch)
    exports = settings.train.export and settings.train.steps < settings.ledger.steps
    if settings.zero.stage in (0, 3) or size == 1:
        return _alike([exports and rank == 0 for rank in range(size)], lambda leads: EXPORTS if leads else "")
    return _outdone(_partitions(settings, size), exports, settings.zero.offload != "none")


def _alike(
    keys: Sequence[Key], why: Callable[[Key], str], held: Callable[[Key], int] = lambda key: 0
) -> list[Role]:
    """One role for each of `keys`, which say by rank what is held."""
    ranks: dict[Key, list[int]] = {}
    for rank, key in enumerate(keys):
        ranks.setdefault(key, []).append(rank)
    told = why if len(ranks) > 1 else lambda key: ""
    return [Role(same[0], tuple(same), why=told(key), held=held(key)) for key, same in ranks.items()]


def _largest_batch(batches: tuple[tuple[int, ...], ...]) -> int:
    return max((len(batch) * max(batch) for batch in batches), default=0)


def _told_batches(batches: tuple[tuple[int, ...], ...]) -> str:
    return (
        "its batches are " + ", ".join(f"{len(b)} x {max(b)} tokens" for b in batches)
        if batches
        else "no prompt"
    )


def _shares(settings: Settings, size: int) -> list[tuple[tuple[int, ...], ...]]:
    """By rank, the lengths of the prompts in each of the batches that are seen."""
    tokenizer = model.tokenizer(settings.model, settings.data.tokenizer)
    lengths = [len(prompt.tokens) for prompt in prompts.find(settings, tokenizer, rehearsed=True)]
    return [
        tuple(tuple(batch) for batch in batches(lengths[rank::size], settings.generation.batch))[
            : settings.ledger.steps
        ]
        for rank in range(size)
    ]


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

    def told(self) -> str:
        """It as what sets a rank apart."""
        when = f"after {self.moment} others" if self.moment else "first"
        return f"the parameters in its partition have {self.held:,} elements, and are reduced {when}"


def _partitions(settings: Settings, size: int) -> list[Partition]:
    """Every rank's."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model.model_config(settings.model))
    ends = list(accumulate(parameter.numel() for parameter in built.parameters()))
    begins = [0, *ends[:-1]]
    length = -(-ends[-1] // (ALIGNMENT * size)) * ALIGNMENT
    found, first = [], 0
    for start in range(0, size * length, length):
        while first < len(ends) and ends[first] <= start:
            first += 1
        after = bisect_left(begins, start + length)
        pieces = tuple(
            min(ends[place], start + length) - max(begins[place], start) for place in range(first, after)
        )
        held = ends[after - 1] - begins[first] if pieces else 0
        moment = len(ends) if not pieces else first if settings.zero.stage == 1 else len(ends) - after
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
        Role(rank, (rank,), tuple(outdone), partitions[rank].told(), partitions[rank].held)
        for rank, outdone in sorted(bounds.items())
    ]
