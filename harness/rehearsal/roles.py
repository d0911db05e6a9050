"""Which ranks of a world must be rehearsed, and for whom each stands.

With ZeRO-0 and 3 every rank holds the same. With ZeRO-1 and 2 a rank copies the gradients of the parameters that its
partition touches into a buffer of their whole size, made when backward reaches the last of them: more bytes, earlier,
is a higher peak. So of any two ranks one whose buffer is as large and as early holds no less, and only the ranks that
no other one outdoes are rehearsed.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
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
    """`rank` is rehearsed; `stands_for` hold the same bytes, itself among them, and `bounds` no more than it.

    `why` is what sets it apart from the others: empty where nothing does.
    """

    rank: int
    stands_for: tuple[int, ...]
    bounds: tuple[int, ...] = ()
    why: str = ""


def roles(settings: Settings) -> list[Role]:
    """The ranks to rehearse. Raises Refusal where the model cannot be read."""
    size = settings.world.size or 1
    if settings.mode == "infer":
        return _alike(_shares(settings, size), _told_batches)
    exports = settings.train.export and settings.train.steps < settings.ledger.steps
    if settings.zero.stage in (0, 3) or size == 1:
        return _alike([exports and rank == 0 for rank in range(size)], lambda leads: EXPORTS if leads else "")
    return _outdone(_partitions(settings, size), exports)


def _alike(keys: Sequence[Key], why: Callable[[Key], str]) -> list[Role]:
    """One role for each of `keys`, which say by rank what is held."""
    ranks: dict[Key, list[int]] = {}
    for rank, key in enumerate(keys):
        ranks.setdefault(key, []).append(rank)
    told = why if len(ranks) > 1 else lambda key: ""
    return [Role(same[0], tuple(same), why=told(key)) for key, same in ranks.items()]


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


def _partitions(settings: Settings, size: int) -> list[tuple[int, int]]:
    """By rank, how many elements the parameters in its partition have, and the place of the last of them."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model.model_config(settings.model))
    ends = list(accumulate(parameter.numel() for parameter in built.parameters()))
    partition = -(-ends[-1] // (ALIGNMENT * size)) * ALIGNMENT
    found, first = [], 0
    for rank in range(size):
        start, end = rank * partition, (rank + 1) * partition
        while first < len(ends) and ends[first] <= start:
            first += 1
        last = first
        while last < len(ends) and ends[last] < end:
            last += 1
        last = min(last, len(ends) - 1)
        held = ends[last] - (ends[first - 1] if first else 0) if first < len(ends) else 0
        found.append((held, last))
    return found


def _outdone(partitions: Sequence[tuple[int, int]], exports: bool) -> list[Role]:
    """The ranks that none outdoes, and rank 0 where it alone exports; each bounds those that it outdoes."""
    order = sorted(range(len(partitions)), key=lambda rank: (partitions[rank], -rank), reverse=True)
    kept: list[int] = []
    for rank in order:  # by size: one is outdone where an earlier one is as early
        if not any(partitions[other][1] >= partitions[rank][1] for other in kept):
            kept.append(rank)
    if exports and 0 not in kept:
        kept.append(0)
    bounds: dict[int, list[int]] = {rank: [] for rank in kept}
    for rank in sorted(set(order) - set(kept)):
        bounds[next(other for other in kept if _outdoes(partitions[other], partitions[rank]))].append(rank)
    end = max(last for _, last in partitions)
    return [
        Role(rank, (rank,), tuple(outdone), _told_partition(*partitions[rank], end))
        for rank, outdone in sorted(bounds.items())
    ]


def _told_partition(held: int, last: int, end: int) -> str:
    reached = "first" if last == end else f"after {end - last} others"
    return f"the parameters in its partition have {held:,} elements, and backward reaches the last of them {reached}"


def _outdoes(one: Iterable[int], other: Iterable[int]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))
