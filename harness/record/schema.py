"""`record.json` as typed data, for its writers and its readers. A file from disk is validated once, by `parse`."""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from harness.record.fields import (
    FROM_DISK,
    Bytes,
    Number,
    Open,
    Part,
    RankNumber,
    Text,
    printable,
    short_repr,
)
from harness.record.memory import UNHEARD, Rank, Where
from harness.record.results import Ceilings, Inference, Model, Performance, Pipeline, Training
from harness.tables import tail


class World(Part):
    """The ranks and devices of a run. A rehearsal also has the `memory` of a device that torch can allocate, in bytes,
    whether its figures are `verified`, and its known `differences` from a real run.
    """

    kind: Text | None = None
    size: Annotated[int, Field(ge=1, le=2**20)]
    device: Text
    device_name: Text | None = None
    memory: Bytes | None = None
    verified: Text | None = None
    differences: list[Text] = Field(default_factory=list)

    @property
    def rehearsed(self) -> bool:
        """Whether the run is a rehearsal, without real ranks."""
        return self.kind == "rehearsed"

    @property
    def devices(self) -> str:
        """Number and type of devices. For a rehearsal, the name of its hardware."""
        return f"{self.size} x {(self.rehearsed and self.device_name) or self.device}"


class Environment(Part):
    """The machine and the packages' versions, torch's number of `threads`, and the words of the command."""

    python: Text | None = None
    platform: Text | None = None
    processor: Text | None = None
    threads: Number | None = None
    packages: dict[Text, Text | None] = Field(default_factory=dict)
    command: list[Text] = Field(default_factory=list)


class Shortage(Part):
    """Memory that ran out: the bytes that were `asked` for, those of the device that were `free`, and its `total`.

    `categories` has what the rank had allocated then.
    """

    asked: Bytes | None = None
    free: Bytes | None = None
    total: Bytes | None = None
    device: Text = ""
    categories: dict[Text, Bytes | None] = Field(default_factory=dict)


class Failure(Part):
    """The rank that failed, its pipeline stage, where it failed, the error, and what memory ran out."""

    rank: RankNumber | None = None
    stage: RankNumber | None = None
    where: Where | None = None
    error: Text | None = None
    shortage: Shortage | None = None


def _each_once(ranks: list[Rank]) -> list[Rank]:
    """Raise ValueError where two records of a rank say different things of it."""
    times = Counter(number for rank in ranks for number in rank.numbers)
    twice = [number for number, count in times.items() if count > 1]
    if twice:
        raise ValueError(f"should have each rank once, and rank {twice[0]} is there twice")
    return ranks


class Record(Part):
    """The fields of `record.json`, without the name of its schema. `resolved` has the reason for a value by its key."""

    status: Literal["complete", "failed"]
    mode: Text
    world: World
    model: Model
    config: Open[dict[str, Any]] = Field(default_factory=dict)
    resolved: dict[Text, Text] = Field(default_factory=dict)
    environment: Environment = Environment()
    failure: Failure | None = None
    pipeline: Pipeline = Pipeline()
    training: Training = Training()
    inference: Inference = Inference()
    performance: Performance = Performance()
    ceilings: Ceilings | None = None
    ranks: Annotated[list[Rank], AfterValidator(_each_once)]

    @property
    def title(self) -> str:
        """The mode and the model."""
        return f"{self.mode} {self.model.short}"

    @property
    def heading(self) -> str:
        """The mode, the model, the dtype and the devices."""
        rehearsed = ", rehearsed" * self.world.rehearsed
        return f"{self.title}{rehearsed}, {self.model.computes}, {self.world.devices}"

    @property
    def limits(self) -> Ceilings:
        """The ceilings; where they are not known, ones without a figure."""
        return self.ceilings or Ceilings()

    def value(self, key: str) -> Any:
        """The config's value of `key`, a path such as `train.steps`. None if there is none."""
        node: Any = self.config
        for name in key.split("."):
            node = node.get(name) if isinstance(node, Mapping) else None
        return node

    @cached_property
    def worst(self) -> Rank:
        """The first of the ranks with the highest peak."""
        return max(self.ranks, key=lambda rank: (rank.peak.bytes or 0, -rank.rank), default=UNHEARD)

    @cached_property
    def by_stage(self) -> Mapping[int, Rank]:
        """For each pipeline stage the first of its ranks with the highest peak."""
        worst: dict[int, Rank] = {}
        for rank in self.ranks:
            if rank.stage not in worst or (rank.peak.bytes or 0) > (worst[rank.stage].peak.bytes or 0):
                worst[rank.stage] = rank
        return worst

    @cached_property
    def peaks(self) -> Mapping[int, int | None]:
        """Each rank's peak, by rank number."""
        return {number: rank.peak.bytes for rank in self.ranks for number in rank.numbers}


def parse(record: Mapping[str, Any], source: str) -> Record:
    """`record` as typed data. Raises ValueError, a sentence that names `source`, the field and its value."""
    return validated(Record, record, source, "record")


LONGEST = 120
"""The most characters of a field's path in a sentence."""

Kind = TypeVar("Kind", bound=BaseModel)


def validated(kind: type[Kind], tree: Mapping[str, Any], source: str, what: str) -> Kind:
    """`tree` as a `kind`, called `what`. Raises ValueError, a sentence that names `source`, the field and its value."""
    try:
        return kind.model_validate(tree, context=FROM_DISK)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = tail(printable(".".join(map(str, first["loc"]))), LONGEST)
        if first["type"] == "missing":
            raise ValueError(f"{source} is not a complete {what}: {field} is missing") from None
        value = short_repr(first["input"])
        problem = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        raise ValueError(f"{source} is not a complete {what}: {field}={value}: {problem}") from None
