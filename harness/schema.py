"""A record as typed data: what lies on anybody's disk is checked once, here, and trusted by nobody before."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


def printable(text: str) -> str:
    """`text` without what a terminal would obey: control characters, line ends, changes of direction."""
    return "".join(character if character.isprintable() else "?" for character in text)


Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, AfterValidator(printable)]
Figures = Mapping[str, int | None]
"""Bytes by category. None: not measured."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Where(_Part):
    """A moment of a run."""

    step: Number
    phase: Text
    micro_batch: Number
    module: Text = ""
    op: Text = ""


class Holding(_Part):
    """Storages under one name: an owner's, or the module and the operator that made them."""

    category: Text
    name: Text
    bytes: Bytes
    storages: Number


class Peak(_Part):
    """The moment when most bytes were alive, and what they were. None: not measured."""

    bytes: Bytes | None
    where: Where | None
    categories: dict[Text, Bytes | None]
    saved: Bytes | None = None
    recomputed: Bytes | None = None
    holdings: list[Holding] | None = None


class Category(_Part):
    """A category's own highest total, and its total at the end."""

    peak: Bytes | None
    end: Bytes | None


class Phase(_Part):
    """What was alive in a phase, by category; the most, and what was left. None: not measured."""

    categories: dict[Text, Bytes | None]
    step: Number = 0
    phase: Text = ""
    micro_batch: Number = 0
    peak: Bytes | None = None
    end: Bytes | None = None
    recomputed: Bytes | None = None


class Forwards(_Part):
    """The most forwards that waited for their backward at once; each one's saved bytes then, the oldest first."""

    alive: Number
    bytes: Bytes
    stashes: list[Bytes] = []
    where: Where | None = None


class Allocator(_Part):
    """The allocator's own count, what of it nobody explains, and what is in no figure of the ledger."""

    source: Text | None = None
    peak: Bytes | None
    unattributed: Annotated[int, Field(gt=-(2**63), lt=2**63)] | None
    foreign: Bytes | None = None


class Rank(_Part):
    """One rank's books; a rehearsed one `stands_for` others, and `bounds` those that hold no more."""

    rank: Number
    stage: Number = 0
    tensor: Number = 0
    stands_for: list[Number] = []
    bounds: list[Number] = []
    why: Text = ""
    peak: Peak
    categories: dict[Text, Category]
    phases: list[Phase] = []
    forwards: Forwards | None = None
    allocator: Allocator

    @property
    def numbers(self) -> list[int]:
        """The ranks whose books these are."""
        return self.stands_for or [self.rank]

    @cached_property
    def highest(self) -> Figures:
        """Each category's own peak, whenever that was."""
        return {name: held.peak for name, held in self.categories.items()}

    @cached_property
    def seen(self) -> Figures:
        """The most of each category in any one phase: all there is where nothing watched the peaks."""
        found: dict[str, int | None] = {}
        for phase in self.phases:
            for name, held in phase.categories.items():
                if held is not None:
                    found[name] = max(held, found.get(name) or 0)
        return found


UNHEARD = Rank(
    rank=0,
    peak=Peak(bytes=None, where=None, categories={}),
    categories={},
    allocator=Allocator(peak=None, unattributed=None),
)
"""A rank that left no books: nothing of it was measured."""


class World(_Part):
    """Where a run ran."""

    size: Annotated[int, Field(ge=1, lt=2**31)]
    device: Text
    device_name: Text | None = None
    kind: Text | None = None
    memory: Bytes | None = None
    verified: Text | None = None
    differences: list[Text] = []

    @property
    def rehearsed(self) -> bool:
        """Whether its ranks do not exist."""
        return self.kind == "rehearsed"

    @property
    def devices(self) -> str:
        """How many of which; a rehearsal's by the name of its hardware."""
        return f"{self.size} x {(self.rehearsed and self.device_name) or self.device}"


class Model(_Part):
    """What ran."""

    name: Text
    parameters: Bytes | None
    dtype: Text | None

    @property
    def short(self) -> str:
        """The name; of a checkpoint's path, its end."""
        return "/".join(self.name.rstrip("/").split("/")[-2:])


class Failure(_Part):
    """Which rank failed, and stage of a pipeline, where, and with what."""

    rank: Number | None = None
    stage: Number | None = None
    where: Where | None = None
    error: Text | None = None


class Pipeline(_Part):
    """The layers of each stage; `bubble` is the part of a training step in which a stage waits for the others."""

    stages: Number = 1
    split: list[Number] = []
    micro_batches: Number | None = None
    bubble: float | None = None


class Training(_Part):
    """What a training run came to."""

    losses: list[float] = []
    optimizer: Text | None = None


class Inference(_Part):
    """What an inference run came to."""

    tensor_parallel: Number = 1
    kv_bytes_per_token: Bytes | None = None
    kv_reserved: Bytes | None = None
    kv_filled: Bytes | None = None
    kv_live: Bytes | None = None


class Idleness(_Part):
    """A stage of a pipeline that generated: a replica's seconds at work, and the part of them all that it waited."""

    stage: Number
    busy_seconds: float
    idle: float


class Performance(_Part):
    """Over all ranks."""

    tokens_per_second: float | None = None
    time_to_first_token_seconds: float | None = None
    stages: list[Idleness] | None = None


class Environment(_Part):
    """What made the figures."""

    command: list[Text] = []


class Record(_Part):
    """`record.json`, as far as people read it."""

    status: Literal["complete", "failed"]
    mode: Text
    world: World
    model: Model
    ranks: list[Rank]
    config: dict[str, Any] = {}
    environment: Environment = Environment()
    failure: Failure | None = None
    pipeline: Pipeline = Pipeline()
    training: Training = Training()
    inference: Inference = Inference()
    performance: Performance = Performance()

    @property
    def title(self) -> str:
        """What ran."""
        return f"{self.mode} {self.model.short}"

    @cached_property
    def worst(self) -> Rank:
        """The first of the ranks with the highest peak."""
        return max(self.ranks, key=lambda rank: (rank.peak.bytes or 0, -rank.rank), default=UNHEARD)

    @cached_property
    def by_stage(self) -> Mapping[int, Rank]:
        """Of each stage of a pipeline the first of the ranks with the highest peak."""
        found: dict[int, Rank] = {}
        for rank in self.ranks:
            if rank.stage not in found or (rank.peak.bytes or 0) > (found[rank.stage].peak.bytes or 0):
                found[rank.stage] = rank
        return found

    @cached_property
    def peaks(self) -> Mapping[int, int | None]:
        """Each rank's peak, by its number."""
        return {number: rank.peak.bytes for rank in self.ranks for number in rank.numbers}


def parse(record: Mapping[str, Any], source: str) -> Record:
    """`record` as typed data. Raises ValueError, a sentence that names `source`, the field and its value."""
    try:
        return Record.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = printable(".".join(map(str, first["loc"])))
        if first["type"] == "missing":
            raise ValueError(f"{source} is no whole record: {field} is missing") from None
        value = printable(repr(first["input"]))
        value = value if len(value) <= 40 else f"{value[:37]}..."
        wrong = first["msg"].removeprefix("Input ")
        raise ValueError(f"{source} is no whole record: {field}={value}: {wrong}") from None
