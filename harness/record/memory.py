"""The memory of one rank, in bytes. None: not measured."""

from functools import cached_property

from pydantic import Field

from harness.ledger.categories import pattern
from harness.record.fields import (
    Bytes,
    Difference,
    Figures,
    Index,
    Number,
    Operations,
    Part,
    RankNumber,
    Text,
)


class Place(Part):
    """A phase of a run: its step, its name, its micro-batch."""

    step: Index
    phase: Text
    micro_batch: Index

    def __str__(self) -> str:
        micro_batch = f" of micro-batch {self.micro_batch}" if self.micro_batch else ""
        return f"step {self.step}, {self.phase}{micro_batch}"


class Where(Place):
    """A moment of a run. `module` was running, and `op` allocated the storage; empty: none."""

    module: Text = ""
    op: Text = ""


class Named(Part):
    """The bytes of a category under one name."""

    category: Text
    name: Text
    bytes: Bytes


class Holding(Named):
    """Storages under one name: an owner's, or the module and operator that allocated them.

    `line` is the source line that allocated them, where the ledger records lines.
    """

    storages: Number
    line: Text = ""

    @property
    def pattern(self) -> str:
        """The name with layer numbers replaced by `*`: `model.layers.*.mlp`."""
        return pattern(self.name)


class Peak(Part):
    """The moment with the most live bytes, and their categories.

    `saved` is the part of the activations that autograd keeps for backward, `recomputed` the part that is there again.
    `allocated` and `reserved` are the most bytes that a GPU's caching allocator had in blocks and in segments, each at
    its own moment.
    """

    bytes: Bytes | None
    allocated: Bytes | None = None
    reserved: Bytes | None = None
    where: Where | None
    categories: dict[Text, Bytes | None]
    saved: Bytes | None = None
    recomputed: Bytes | None = None
    holdings: list[Holding] | None = None


class Category(Part):
    """A category's own highest total, and its total at the end."""

    peak: Bytes | None
    end: Bytes | None


class Work(Part):
    """The work of one class of operators: operations, bytes read and written, and how many operators moved any."""

    flops: Operations = 0
    read: Operations = 0
    written: Operations = 0
    calls: Operations = 0


class Phase(Part):
    """The live bytes of a phase, at the most and at its end; by category at the most.

    `saved` and `recomputed` are parts of the activations at the most, as at a `Peak`. `flops` are floating-point
    operations, `read` and `written` the bytes that its operators move, `passes` the model's forward calls; `work` has
    the same by class of operators. A record of an older version has no `work`.
    """

    step: Index = 0
    phase: Text = ""
    micro_batch: Index = 0
    peak: Bytes | None = None
    end: Bytes | None = None
    categories: dict[Text, Bytes | None]
    saved: Bytes | None = None
    recomputed: Bytes | None = None
    flops: Operations | None = None
    read: Operations | None = None
    written: Operations | None = None
    passes: Operations | None = None
    work: dict[Text, Work] | None = None

    @property
    def moved(self) -> int | None:
        """Bytes read and written."""
        return None if self.read is None or self.written is None else self.read + self.written


class Cause(Part):
    """The bytes of a transfer that were for one thing: parameters, a module, an owner's tensor."""

    name: Text
    bytes: Bytes


class Transfer(Place):
    """What moved in a phase, of one kind: an `operation` of the ranks in `group`, of which there are `ranks`.

    `link` is the slowest that it crosses. `bytes` is the payload of all `calls`: the whole tensor that an all-gather
    fills or a reduce-scatter takes, the tensor of the others. `by_ring` and `by_tree` are the bytes that this rank
    sends if a library does it so. `causes` has the payload by name, layer numbers replaced by `*`. The operation
    `nothing` says that the phase moves nothing from this step on.
    """

    operation: Text
    group: Text = ""
    ranks: Number = 0
    link: Text | None = None
    calls: Operations
    bytes: Operations
    by_ring: Operations | None = None
    by_tree: Operations | None = None
    causes: list[Cause] | None = None


class OnHost(Part):
    """The most bytes of `activations` that waited in the host's memory at once, in no category of the device.

    `pinned` is what CUDA's allocator of pinned memory reserves for them, or more: it rounds each to a power of two.
    """

    activations: Bytes
    pinned: Bytes | None = None
    where: Place | None = None


class Forwards(Part):
    """The most forwards that waited for their backward at once.

    `stashes` has the bytes of saved activations of each, the oldest first; where some wait in the host's memory, those.
    """

    alive: Number
    bytes: Bytes
    stashes: list[Bytes] = Field(default_factory=list)
    where: Where | None = None


class Exhausted(Where):
    """The place of the first allocation that a GPU had no room for, and its `bytes`."""

    bytes: Bytes


class Allocator(Part):
    """The allocator's own count, and its unexplained part.

    `foreign` are externally owned bytes, in no other figure: mapped files, numpy arrays, and what is older than the
    ledger.

    The others are of a GPU's caching allocator under the `settings` of PYTORCH_ALLOC_CONF: the most bytes that it
    `reserved`, in how many `segments`; then the `slack` that was not allocated, of which `split` is what is free in
    segments that are partly in use; how often it emptied its cache and tried again; and the allocation that `exhausted`
    the GPU's memory. `outside` is what lies on a GPU outside torch.
    """

    source: Text | None = None
    peak: Bytes | None
    unattributed: Difference | None
    foreign: Bytes | None = None
    reserved: Bytes | None = None
    slack: Bytes | None = None
    split: Bytes | None = None
    segments: Number | None = None
    retries: Number | None = None
    settings: Text | None = None
    exhausted: Exhausted | None = None
    outside: Bytes | None = None


class Rank(Part):
    """The record of one rank, of a pipeline `stage`; `share` is its tensor-parallel rank.

    In a rehearsal `stands_for` are its equivalent ranks, which have the same bytes, itself included; `bounds` are ranks
    that peak no higher; `why` says why it was chosen. `unseen` names what the ledger did not see. `traffic` is what
    moved, by phase; where a phase is not there, the same moved as in the step before. None: it was not counted.
    `on_host` is what waited in the host's memory in place of the device's. None: nothing did.
    """

    rank: RankNumber
    stage: RankNumber = 0
    share: RankNumber = 0
    stands_for: list[RankNumber] = Field(default_factory=list)
    peak: Peak
    categories: dict[Text, Category]
    phases: list[Phase] = Field(default_factory=list)
    traffic: list[Transfer] | None = None
    forwards: Forwards | None = None
    on_host: OnHost | None = None
    allocator: Allocator
    unseen: list[Text] = Field(default_factory=list)
    bounds: list[RankNumber] = Field(default_factory=list)
    why: Text = ""

    @property
    def numbers(self) -> list[int]:
        """The ranks for which this record stands."""
        return self.stands_for or [self.rank]

    @cached_property
    def highest(self) -> Figures:
        """Each category's own peak, at any moment."""
        return {name: category.peak for name, category in self.categories.items()}

    @cached_property
    def seen(self) -> Figures:
        """The most of each category in any one phase: a lower bound where the peaks were not measured."""
        most: dict[str, int | None] = {}
        for phase in self.phases:
            for name, nbytes in phase.categories.items():
                if nbytes is not None:
                    most[name] = max(nbytes, most.get(name) or 0)
        return most


UNHEARD = Rank(
    rank=0,
    peak=Peak(bytes=None, where=None, categories={}),
    categories={},
    allocator=Allocator(peak=None, unattributed=None),
)
"""The record of a rank that left none: nothing was measured."""
