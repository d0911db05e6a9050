"""A record as typed data. A file from disk is validated once, here, and not trusted before."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from harness.ledger.categories import pattern


def printable(text: str) -> str:
    """`text` without characters that control a terminal: control characters, line ends, changes of direction."""
    return "".join(character if character.isprintable() else "?" for character in text)


Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(ge=0, lt=2**31)]
Operations = Annotated[int, Field(ge=0, lt=2**100)]
"""Floating-point operations, or bytes moved by all of a phase's operators. They have no natural limit."""
Text = Annotated[str, AfterValidator(printable)]
Figures = Mapping[str, int | None]
"""Bytes by category. None: not measured."""


ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an element that is not packed."""


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
    """Storages under one name: an owner's, or the module and operator that allocated them."""

    category: Text
    name: Text
    bytes: Bytes
    storages: Number
    line: Text = ""

    @property
    def pattern(self) -> str:
        """The name with layer numbers replaced by `*`: `model.layers.*.mlp`."""
        return pattern(self.name)


class Peak(_Part):
    """The moment with the most live bytes, and their categories. None: not measured."""

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
    """The live bytes of a phase by category, at the most and at its end; its operations, bytes read and written, and
    forward calls.

    None: not measured.
    """

    categories: dict[Text, Bytes | None]
    step: Number = 0
    phase: Text = ""
    micro_batch: Number = 0
    peak: Bytes | None = None
    end: Bytes | None = None
    recomputed: Bytes | None = None
    flops: Operations | None = None
    read: Operations | None = None
    written: Operations | None = None
    passes: Operations | None = None

    @property
    def moved(self) -> int | None:
        """Bytes read and written."""
        return None if self.read is None or self.written is None else self.read + self.written


class Forwards(_Part):
    """The most forwards that waited for their backward at once. `stashes`: each one's saved bytes, the oldest first."""

    alive: Number
    bytes: Bytes
    stashes: list[Bytes] = []
    where: Where | None = None


class Allocator(_Part):
    """The allocator's own count, its unexplained part, and externally owned bytes outside the ledger's figures."""

    source: Text | None = None
    peak: Bytes | None
    unattributed: Annotated[int, Field(gt=-(2**63), lt=2**63)] | None
    foreign: Bytes | None = None


class Rank(_Part):
    """The record of one rank. In a rehearsal it also `stands_for` equal ranks, and `bounds` ranks with no more bytes.

    `unseen` names what the ledger did not see.
    """

    rank: Number
    stage: Number = 0
    share: Number = 0
    stands_for: list[Number] = []
    bounds: list[Number] = []
    why: Text = ""
    peak: Peak
    categories: dict[Text, Category]
    phases: list[Phase] = []
    forwards: Forwards | None = None
    allocator: Allocator
    unseen: list[Text] = []

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


class World(_Part):
    """The ranks and devices of a run."""

    size: Annotated[int, Field(ge=1, lt=2**31)]
    device: Text
    device_name: Text | None = None
    kind: Text | None = None
    memory: Bytes | None = None
    verified: Text | None = None
    differences: list[Text] = []

    @property
    def rehearsed(self) -> bool:
        """Whether the run is a rehearsal, without real ranks."""
        return self.kind == "rehearsed"

    @property
    def devices(self) -> str:
        """Number and type of devices. For a rehearsal, the name of its hardware."""
        return f"{self.size} x {(self.rehearsed and self.device_name) or self.device}"


class Quantization(_Part):
    """How a checkpoint's weights are packed. `bytes` is the size of all weights, also those that are not packed.

    `whole` says when they are unpacked; None: never.
    """

    method: Text
    bits: Number | None = None
    group_size: Number | None = None
    whole: Text | None = None
    bytes: Bytes

    @property
    def short(self) -> str:
        """The method, and the bits of a weight."""
        return self.method + (f" {self.bits} bits" if self.bits else "")


class Model(_Part):
    """The model of the run. A packed parameter counts as one."""

    name: Text
    parameters: Bytes | None
    dtype: Text | None
    embeddings: Bytes | None = None
    quantization: Quantization | None = None

    @property
    def matrices(self) -> float | None:
        """Bytes of the weights that each token is multiplied with: all parameters except embedding tables."""
        itemsize = ITEMSIZE.get(self.dtype or "", 0)
        tables = (self.embeddings or 0) * itemsize
        if self.quantization is not None and self.quantization.whole is None:
            return self.quantization.bytes - tables
        return None if self.parameters is None else self.parameters * itemsize - tables

    @property
    def short(self) -> str:
        """The name. For a path of a checkpoint, its last two parts."""
        return "/".join(self.name.rstrip("/").split("/")[-2:])


class Failure(_Part):
    """The rank that failed, its pipeline stage, where it failed, and the error."""

    rank: Number | None = None
    stage: Number | None = None
    where: Where | None = None
    error: Text | None = None


class Pipeline(_Part):
    """The layers of each stage. `bubble` is the share of a training step in which a stage waits for the others."""

    stages: Number = 1
    split: list[Number] = []
    micro_batches: Number | None = None
    bubble: float | None = None


class Training(_Part):
    """The results of a training run."""

    losses: list[float] = []
    optimizer: Text | None = None


class Setting(_Part):
    """A field of the generation config: its value, its source, and if it has no effect, why (`moot`)."""

    value: Any
    source: Text
    moot: Text = ""


class Inference(_Part):
    """The results of an inference run."""

    prompts: Number | None = None
    prompt_tokens: Bytes | None = None
    max_new_tokens: Number | None = None
    generation_config: dict[Text, Setting] = {}
    cache: Text | None = None
    kv_bytes_per_token: Bytes | None = None
    attention_flops_per_position: Bytes | None = None
    kv_reserved: Bytes | None = None
    kv_filled: Bytes | None = None
    kv_live: Bytes | None = None
    kv_pinned: Bytes | None = None
    kv_state: Bytes | None = None
    kv_host: Bytes | None = None


class Idleness(_Part):
    """A pipeline stage in generation: the seconds that a replica works, and the share of the time that it waits."""

    stage: Number
    busy_seconds: float
    idle: float


class Took(_Part):
    """A phase's median seconds per step over `steps` steps, on the rank that is slowest in it."""

    phase: Text
    seconds: Annotated[float, Field(ge=0)]
    steps: Number
    rank: Number = 0


class Ceilings(_Part):
    """The limits of a device: bytes and operations per second, from a page or measured. None: not known."""

    source: Text = ""
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    flops: Annotated[float, Field(gt=0)] | None = None
    dtype: Text = ""

    @property
    def balance(self) -> float | None:
        """Operations that the device can do while it moves one byte."""
        return self.flops / self.bandwidth if self.flops and self.bandwidth else None

    def at_best(self, flops: float, moved: float) -> float | None:
        """The least seconds for so many operations and bytes."""
        if not self.flops or not self.bandwidth:
            return None
        return max(flops / self.flops, moved / self.bandwidth)


class Percentiles(_Part):
    """Seconds at the 50th, 95th and 99th percentile."""

    p50: float
    p95: float
    p99: float


class Latency(_Part):
    """Latency of requests that all wait from the start. None: no request had such a wait."""

    first_token_seconds: Percentiles | None = None
    between_tokens_seconds: Percentiles | None = None


class Performance(_Part):
    """Results over all ranks."""

    tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    time_to_first_token_seconds: float | None = None
    compile_seconds: float | None = None
    latency: Latency = Latency()
    stages: list[Idleness] | None = None
    phases: list[Took] | None = None


class Environment(_Part):
    """The command and packages of the run."""

    command: list[Text] = []
    packages: dict[Text, Text | None] = {}


class Record(_Part):
    """The fields of `record.json` that are shown to people."""

    status: Literal["complete", "failed"]
    mode: Text
    world: World
    model: Model
    ranks: list[Rank]
    config: dict[str, Any] = {}
    resolved: dict[Text, Text] = {}
    environment: Environment = Environment()
    failure: Failure | None = None
    pipeline: Pipeline = Pipeline()
    training: Training = Training()
    inference: Inference = Inference()
    performance: Performance = Performance()
    ceilings: Annotated[Ceilings, BeforeValidator(lambda ceilings: ceilings or {})] = Ceilings()

    @property
    def title(self) -> str:
        """The mode and the model."""
        return f"{self.mode} {self.model.short}"

    @property
    def heading(self) -> str:
        """The mode, the model, the dtype and the devices."""
        rehearsed = ", rehearsed" * self.world.rehearsed
        return f"{self.title}{rehearsed}, {self.model.dtype or '-'}, {self.world.devices}"

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


Kind = TypeVar("Kind", bound=BaseModel)


def validated(kind: type[Kind], tree: Mapping[str, Any], source: str, what: str) -> Kind:
    """`tree` as a `kind`, called `what`. Raises ValueError, a sentence that names `source`, the field and its value."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = printable(".".join(map(str, first["loc"])))
        if first["type"] == "missing":
            raise ValueError(f"{source} is no whole {what}: {field} is missing") from None
        value = printable(repr(first["input"]))
        value = value if len(value) <= 40 else f"{value[:37]}..."
        problem = first["msg"].removeprefix("Input ")
        raise ValueError(f"{source} is no whole {what}: {field}={value}: {problem}") from None
