"""Every field of the config: its type, range, default and purpose.

A field's place is its Hydra path (`Settings.train.steps` is `train.steps=`), and its docstring is what `--help` prints.
Nothing here imports torch, so a wrong request is refused within a second.
"""

import os
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from harness.config.layout import Layout
from harness.config.refusal import Refusal as Refusal
from harness.config.refusal import as_typed as as_typed

MOST = 2**53 - 1
"""The largest number allowed. Up to here JSON, doubles and 64-bit integers agree, and no library counter overflows."""


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number, and no true or false")
    return value


_Number = BeforeValidator(_no_truth)
Positive = Annotated[int, Field(ge=1, le=MOST), _Number]
Count = Annotated[int, Field(ge=1, le=2**20), _Number]
"""A number of things that a run, or its rehearsal, has one by one. No run has a million of them at once."""
Tokens = Annotated[int, Field(ge=1, lt=2**31), _Number]
"""A number of tokens, or of what has some: torch counts their bytes in 64 bits."""
NotNegative = Annotated[int, Field(ge=0, le=MOST), _Number]
ZeroStage = Annotated[int, Field(ge=0, le=3), _Number]
PositiveFloat = Annotated[float, Field(gt=0, le=1e30), _Number]
NotNegativeFloat = Annotated[float, Field(ge=0, le=1e30), _Number]

NEW_TOKENS = 64
"""The default limit of tokens generated for a prompt."""


def _above_zero(value: float) -> float:
    if value > 0:
        return value
    raise ValueError("should be greater than 0; generation.sample=false takes the likeliest token")


Beta = Annotated[float, Field(ge=0, lt=1), _Number]

Temperature = Annotated[float, Field(le=1e30), AfterValidator(_above_zero), _Number]


def _of_home(path: str) -> str:
    return os.path.expanduser(path)


Place = Annotated[str, AfterValidator(_of_home)]
"""A path. A leading ~ is the home directory, ~NAME that of a user; a file named so is ./~."""

_STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, use_attribute_docstrings=True)


def _names(value: object) -> object:
    """The names of a list that may be written as one name, or as none."""
    if value is None or value == "none":
        return []
    return list(dict.fromkeys(value)) if isinstance(value, list) else [value]


Names = Annotated[list[str], BeforeValidator(_names)]
Trackers = Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], BeforeValidator(_names)]


@dataclass(frozen=True, config=_STRICT)
class Model:
    name: str = "tiny"
    """The name in the record; where model.path is set, that path."""
    path: Place | None = None
    """Checkpoint directory or hub name; replaces the group's shape."""
    random: bool = False
    """Take only the config of model.path, with random weights."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """How attention is computed; auto is transformers' own choice for the model."""
    trust_remote_code: Literal[False] = False
    """Code from a hub is never run."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the transformers config; of model.path's only its quantization_config."""


@dataclass(frozen=True, config=_STRICT)
class Data:
    kind: Literal["stdlib", "text", "hub"] = "stdlib"
    """Set by data=."""
    name: str | None = None
    """data=hub: the dataset's name."""
    path: Place | None = None
    """data=text: a file, a directory or a quoted glob."""
    split: str = "train"
    """data=hub: the split."""
    column: str = "text"
    """data=hub: the column that has the text."""
    streaming: bool = False
    """data=hub: read the data during the run and store nothing."""
    tokenizer: Place | None = None
    """Replaces the model's own tokenizer; without either, bytes are tokens."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the text held out for validation."""
    cache_dir: Place | None = None
    """Where token files are kept; null is the default of the datasets library."""


@dataclass(frozen=True, config=_STRICT)
class Zero:
    stage: ZeroStage = 1
    """Set by zero=; 1 shards optimizer state, 2 gradients, 3 parameters."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in the host's memory."""
    reduce_bucket_size: Positive = 5_000_000
    """Elements of gradient reduced at once."""
    allgather_bucket_size: Positive = 5_000_000
    """Elements of parameter gathered at once."""
    prefetch_bucket_size: NotNegative = 5_000_000
    """Stage 3: elements fetched ahead."""
    persistence_threshold: NotNegative = 10_000
    """Stage 3: smaller parameters are never sharded."""


@dataclass(frozen=True, config=_STRICT)
class Deepspeed:
    config: str | None = None
    """Training: a ds_config.json; its keys become the settings that they are."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Other keys of DeepSpeed's config: deepspeed.options.zero_optimization.overlap_comm=true."""


@dataclass(frozen=True, config=_STRICT)
class Checkpointing:
    mode: Literal["none", "selective", "full"] = "none"
    """Set by checkpointing=; full keeps a layer's input, selective its matrix products and attention too."""
    layers: list[NotNegative] = Field(default_factory=list)
    """The layers to recompute, from 0, as [0,1]; empty is all."""
    every: Positive = 1
    """Recompute every n-th layer, from the first."""


@dataclass(frozen=True, config=_STRICT)
class Pipeline:
    stages: Count = 1
    """How many stages the layers are cut into."""
    split: Literal["uniform", "parameters", "memory"] | list[Positive] = "uniform"
    """Layers of each stage: evenly, by parameters, by rehearsed peak, or as [3,5]."""
    groups: Positive | None = None
    """Generation: groups of prompts in flight; null is one a stage."""


@dataclass(frozen=True, config=_STRICT)
class Train:
    steps: Positive = 100
    """Optimizer steps of the whole run, those before a resume included."""
    micro_batch: Count = 4
    """Sequences a rank takes at once."""
    accumulation: Count = 1
    """Micro-batches in a step."""
    batch: Positive | None = None
    """Sequences in a step over all ranks; checked if set."""
    sequence: Tokens = 256
    """Tokens in a sequence."""
    learning_rate: PositiveFloat = 1e-3
    """AdamW's highest learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay of its two means of gradients, as [0.9,0.95]."""
    epsilon: NotNegativeFloat = 1e-8
    """AdamW's term that keeps a division from 0."""
    warmup_steps: NotNegative = 0
    """Steps from zero to the learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up."""
    weight_decay: NotNegativeFloat = 0.1
    """AdamW's weight decay."""
    fused: bool = False
    """AdamW in one kernel, without temporaries."""
    clip: NotNegativeFloat = 1.0
    """Largest gradient norm; 0 is off."""
    validate_every: NotNegative = 50
    """Steps between validations; 0 is never."""
    validation_batches: Count = 8
    """Micro-batches a rank validates on."""
    save_every: NotNegative = 0
    """Steps between full-state checkpoints; 0 is never."""
    save_on_term: bool = False
    """On SIGTERM, end the step, write a full-state checkpoint, and exit with 75: run again with train.resume."""
    keep: Count = 2
    """Number of complete full-state checkpoints kept."""
    resume: Place | None = None
    """Directory of the run to continue."""
    resume_changes: Names = Field(default_factory=list)
    """Keys that may differ from the run to continue, as [train.steps,data]."""
    nonfinite: Literal["stop", "skip", "ignore"] = "stop"
    """A loss or gradient that is NaN or infinite: stop before the update, skip the update, or go on."""
    export: bool = True
    """Write checkpoint/ in transformers' format at the end."""


@dataclass(frozen=True, config=_STRICT)
class Generation:
    batch: Count = 4
    """Prompts a rank generates from at once."""
    prompts: Place | None = None
    """File of prompts, one a line."""
    prompt: list[str] = Field(default_factory=list)
    """Prompts, as ['first one','second one']."""
    count: Count = 8
    """Prompts sampled from the data where none are given."""
    prompt_length: Tokens = 64
    """Tokens of a sampled prompt."""
    max_new_tokens: Tokens | None = None
    """Most tokens generated for a prompt; null is what the checkpoint says, else 64."""
    cache: Literal["dynamic", "static", "paged", "quantized", "offloaded", "none"] = "dynamic"
    """KV cache; none recomputes everything."""
    cache_bits: Literal[8, 4, 2] = 8
    """cache=quantized: bits of an element; 4 and 2 by optimum-quanto."""
    batching: Literal["static", "continuous"] = "static"
    """Continuous: a finished prompt gives its place to the next; static: a batch waits for its longest."""
    page_size: Annotated[int, Field(ge=4, lt=2**31)] = 16
    """cache=paged: tokens in a page."""
    pages: Tokens | None = None
    """cache=paged: pages of all layers; null is enough for the longest request in every place."""
    batch_tokens: Tokens | None = None
    """batching=continuous: most tokens in a forward; null is the longest prompt, or about 512 at once."""
    workload: Place | None = None
    """File of requests, a JSON object a line: a prompt or its prompt_length, and its own max_new_tokens."""
    lengths: Literal["fixed", "uniform", "skewed"] = "fixed"
    """Lengths of sampled prompts and of their answers: all the longest, or drawn by seed from 1 to the longest."""
    tensor_parallel: Count = 1
    """How many ranks share each layer, by transformers' own plan."""
    compile: bool = False
    """Compile the decoding step; needs cache=static."""
    sample: bool | None = None
    """Draw tokens; false takes the likeliest; null is what the checkpoint says, else false."""
    temperature: Temperature | None = None
    """Sampling: below 1 is sharper; null is what the checkpoint says, else 1."""
    top_k: NotNegative | None = None
    """Sampling: only the k likeliest, 0 is off; null is what the checkpoint says, else 0."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sampling: only the likeliest that add up to p, 1 is off; null is what the checkpoint says, else 1."""
    stop_at_eos: bool = True
    """End a sequence at the checkpoint's end-of-sequence tokens."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Other fields of transformers' GenerationConfig, over the checkpoint's: generation.config.min_new_tokens=8."""


@dataclass(frozen=True, config=_STRICT)
class Ledger:
    mode: Literal["exact", "phases", "off"] = "exact"
    """Set by ledger=."""
    steps: Positive = 3
    """ledger=exact: how many first steps or batches are exact; ledger=phases after them."""
    trace: bool = True
    """Write every event of the exact steps to trace/, for harness report."""
    snapshot: bool = False
    """On CUDA, keep torch's own snapshot too, for memory_viz."""


@dataclass(frozen=True, config=_STRICT)
class World:
    kind: Literal["torchrun", "rehearsed"] = "torchrun"
    """Set by world=."""
    size: Annotated[int, Field(ge=1, le=2**20), _Number] | None = None
    """Number of ranks this config is for; any other number is refused."""
    per_node: Annotated[int, Field(ge=1, le=2**20), _Number] | None = None
    """Ranks on a node; null: as torchrun started them, and in a rehearsal 8 GPUs, or all ranks of CPUs."""
    timeout: Annotated[float, Field(ge=1, le=1e8), _Number] = 600.0
    """Seconds a rank waits for the others; 1e8 is three years."""


@dataclass(frozen=True, config=_STRICT)
class Hardware:
    name: str = "auto"
    """The name in the record."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Auto is a GPU where there is one."""
    memory: Positive | None = None
    """Bytes of memory on a device: the vendor's, in powers of 1000; if you set it, the whole budget."""
    memory_driver: Positive | None = None
    """Bytes that nvidia-smi prints as the total, exact to a MiB; null: unknown."""
    memory_torch: Positive | None = None
    """Bytes of torch's total_memory, to a MiB for one driver, about 1% apart between drivers; null: unknown."""
    bandwidth: PositiveFloat | None = None
    """Bytes a second from the device's memory."""
    flops_bf16: PositiveFloat | None = None
    """Dense bf16 operations a second, accumulated in fp32: the peak that utilization is measured against."""
    flops_bf16_sparse: PositiveFloat | None = None
    """The same with 2:4 sparse weights: the rate that vendors print."""
    flops_fp16_accumulate: PositiveFloat | None = None
    """Dense fp16 operations a second, accumulated in fp16."""
    link: PositiveFloat | None = None
    """Bytes a second between devices, sum of both directions."""
    link_kind: Literal["nvlink", "infinity-fabric", "pcie"] | None = None
    """What connects the devices of a node; null: unknown."""
    host_link: PositiveFloat | None = None
    """Bytes a second between a device and its host, in each direction; null: half of link by PCIe, else unknown."""
    capability: PositiveFloat | None = None
    """A GPU's compute capability, as 8.9: it decides which kernels for packed weights exist."""
    multiprocessors: Positive | None = None
    """A GPU's streaming multiprocessors: some kernels take scratch for each."""
    allocator: str | None = None
    """In a rehearsal, the settings of torch's CUDA allocator; null: those in PYTORCH_ALLOC_CONF."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where a page's figures were read, by their keys."""

    @property
    def to_host(self) -> float | None:
        """Bytes a second between a device and its host, in each direction. None: not known."""
        return self.host_link or (self.between if self.link_kind == "pcie" else None)

    @property
    def between(self) -> float | None:
        """Bytes a second from a device to the others of its node. None: not known."""
        return None if self.link is None else self.link / 2


@dataclass(frozen=True, config=_STRICT)
class Network:
    name: str = "auto"
    """The name in the record."""
    bandwidth: PositiveFloat | None = None
    """Bytes a second through a port, in each direction; null: unknown."""
    ports: Count | None = None
    """Ports of a node for what its devices send to other nodes; null: unknown."""
    per_node: Count | None = None
    """Devices of a node: what a rehearsal of GPUs takes world.per_node to be; null: unknown."""
    latency: NotNegativeFloat | None = None
    """Seconds that a step from one node to another takes at least; null: unknown."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where a page's figures were read, by their keys."""

    @property
    def of_node(self) -> float | None:
        """Bytes a second out of a node, and as many into it. None: not known."""
        return None if self.bandwidth is None or self.ports is None else self.bandwidth * self.ports


@dataclass(frozen=True, config=_STRICT)
class Settings:
    mode: Literal["train", "infer"] = "train"
    """What to run."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of parameters, gradients, activations, KV cache; auto is bf16 on GPUs and on CPUs faster in it, else fp32."""
    seed: Annotated[int, Field(ge=0, lt=2**32), _Number] = 0
    """Seed of weights, data order and sampling."""
    tracker: Trackers = Field(default_factory=list)
    """Who else gets a run's figures while it goes on, as wandb or [wandb,mlflow]; offline."""
    model: Model = Model()
    data: Data = Data()
    zero: Zero = Zero()
    deepspeed: Deepspeed = Deepspeed()
    checkpointing: Checkpointing = Checkpointing()
    pipeline: Pipeline = Pipeline()
    train: Train = Train()
    generation: Generation = Generation()
    ledger: Ledger = Ledger()
    world: World = World()
    hardware: Hardware = Hardware()
    network: Network = Network()

    @property
    def dtype(self) -> str:
        """torch's name of the precision. The precision must be resolved: "auto" raises KeyError."""
        return {"bf16": "bfloat16", "fp32": "float32"}[self.precision]

    @property
    def tensor_parallel(self) -> int:
        """How many ranks share each layer; 1 in training, where each rank has whole layers."""
        return self.generation.tensor_parallel if self.mode == "infer" else 1

    def layout(self, size: int) -> Layout:
        """The place of each of `size` ranks."""
        return Layout(size, self.pipeline.stages, self.tensor_parallel)


RESOLVED = ("precision", "model.attention")
"""Keys whose `auto` is decided before a run begins, in `model/resolve.py`."""


@dataclass(frozen=True)
class FieldHelp:
    """A field as `--help` prints it. Refusals print its `range`; `text` says whether it accepts any text."""

    default: Any
    choices: tuple[str, ...]
    text: bool
    meaning: str
    range: str


@cache
def described_fields() -> dict[str, FieldHelp]:
    """Every field by its path `group.key`, in declaration order."""
    schema = TypeAdapter(Settings).json_schema()
    fields: dict[str, FieldHelp] = {}
    for name, field in schema["properties"].items():
        group = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2])
        for key, value in group["properties"].items() if group else ():
            fields[f"{name}.{key}"] = _field_help(value)
        if not group:
            fields[name] = _field_help(field)
    return fields


def _field_help(schema: dict[str, Any]) -> FieldHelp:
    items = schema.get("items", {})
    choices = tuple(map(str, schema.get("enum", items.get("enum", ()))))
    kinds = [part.get("type") for part in (schema, items, *schema.get("anyOf", ()))]
    empty: Any = {"array": [], "object": {}}.get(
        kinds[0] or ""
    )  # a JSON schema has no default for a default_factory
    text = "string" in kinds and not choices
    return FieldHelp(
        schema.get("default", empty), choices, text, schema.get("description", ""), _range(schema)
    )


def _range(schema: Mapping[str, Any]) -> str:
    """The allowed range of a number, as text; empty for fields without one."""
    phrases = {
        "minimum": "{} or more",
        "exclusiveMinimum": "above {}",
        "maximum": "{} or less",
        "exclusiveMaximum": "below {}",
    }
    for part in (schema, *schema.get("anyOf", ())):
        limits = {name: int(part[name]) for name in phrases if part.get(name, MOST) < MOST}
        if limits:
            return " and ".join(phrases[name].format(limit) for name, limit in limits.items())
    return ""
