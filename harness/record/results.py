"""The results of a run: its model, its figures and its speed."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from harness.record.fields import Bytes, Number, Open, Part, RankNumber, Rate, Seconds, Share, Text

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an element that is not packed."""


class Quantization(Part):
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


class Products(Part):
    """The `dtype` in which linear layers multiply, where it is not the model's, and how many do, `of` all of them.

    `share` is theirs of the elements of all matrices, embedding tables left out.
    """

    dtype: Text
    layers: Number
    of: Number
    share: Share

    @property
    def short(self) -> str:
        """As text."""
        return f"{self.layers} of {self.of} linear layers ({self.share:.0%} of its matrices) multiply in {self.dtype}"


class Model(Part):
    """The model of the run: its number of parameters, and of those in lookup tables (`embeddings`).

    A packed parameter counts as one. `trainable` is the number that is trained beside an adapter's frozen ones; None:
    no adapter is trained. `products` None: all multiply in `dtype`.
    """

    name: Text
    parameters: Bytes | None
    embeddings: Bytes | None = None
    trainable: Bytes | None = None
    quantization: Quantization | None = None
    products: Products | None = None
    dtype: Text | None

    @property
    def computes(self) -> str:
        """Its dtype, and that of its products where it is another, as text."""
        return f"{self.dtype or '-'}{f' by {self.products.dtype}' if self.products else ''}"

    @property
    def multiplied(self) -> str:
        """The dtype of its matrix products, which limits their speed; empty where it is not known."""
        return (self.products.dtype if self.products else self.dtype) or ""

    @property
    def counted(self) -> str:
        """The number of its parameters, and of those that are trained beside frozen ones, as text."""
        if self.parameters is None:
            return "parameters not counted"
        trained = "" if self.trainable is None else f", {self.trainable:,} of them trained"
        return f"{self.parameters:,} parameters{trained}"

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


class Pipeline(Part):
    """The layers of each stage. `bubble` is the share of a training step in which a stage waits for the others."""

    stages: Annotated[int, Field(ge=1, le=2**20)] = 1
    split: list[Number] = Field(default_factory=list)
    micro_batches: Number | None = None
    bubble: Share | None = None


class Validation(Part):
    """The mean validation loss after so many steps."""

    step: Number
    loss: float


class Unsaved(Part):
    """A checkpoint that could not be written: after how many steps, and why."""

    step: Number
    error: Text


class Change(Part):
    """A setting in which a run differs from the one that it resumes: its key, the value saved there, and its own."""

    key: Text
    saved: Any
    value: Any


class Training(Part):
    """The results of a training run: the loss of each of its steps.

    `first_step` is the number of steps before, of the run that it resumes. `skipped` are the steps, from 0, whose
    update was left out because a loss or gradient was not finite. The lists grow during the run. A resumed run has
    its `changes`, and the keys of which the checkpoint does not say whether they were the same (`unknown`).

    Where documents are padded or only answers are learnt: its steps had so many `tokens` on all ranks, `label_tokens`
    of them with a loss, and `padding_tokens` beside. `cut_tokens` of the documents are beyond the sequence.
    """

    first_step: Number = 0
    losses: list[float] = Field(default_factory=list)
    validation: list[Validation] = Field(default_factory=list)
    unsaved: list[Unsaved] = Field(default_factory=list)
    optimizer: Text | None = None
    skipped: list[Number] = Field(default_factory=list)
    changes: list[Change] = Field(default_factory=list)
    unknown: list[Text] = Field(default_factory=list)
    tokens: Bytes | None = None
    label_tokens: Bytes | None = None
    padding_tokens: Bytes | None = None
    cut_tokens: Bytes | None = None

    @property
    def padded(self) -> float:
        """The share of padding in what is computed: of its positions, and so of its operations and activations."""
        return (self.padding_tokens or 0) / max(1, (self.tokens or 0) + (self.padding_tokens or 0))


class Setting(Part):
    """A field of the generation config: its value, its source, and if it has no effect, why (`moot`)."""

    value: Open[Any]
    source: Text
    moot: Text = ""


class Inference(Part):
    """The results of an inference run. The `kv_` figures are of the replica with the largest cache, at its batch's end.

    In bytes for a token in all layers: `kv_bytes_per_token` by the model's shape, `kv_bytes_per_token_measured` by the
    cache. In bytes: `kv_reserved`, all storages of the cache; `kv_filled`, its positions with padding; `kv_live`, those
    without; `kv_pinned`, what views keep; `kv_state`, what does not grow with a sequence; `kv_host`, the part in host
    memory. `kv_positions` is the number of positions.

    `pages` of a paged cache are all, `pages_used` the most at once. In tokens: all `prompt_tokens`, the
    `max_new_tokens` of any prompt, all `new_tokens`, the `unasked_tokens` computed after a request's end, and the
    `padding_tokens` of the prompts. `tensor_parallel` ranks share each layer.
    """

    prompts: Number | None = None
    prompt_tokens: Bytes | None = None
    max_new_tokens: Number | None = None
    cache: Text | None = None
    tensor_parallel: Number | None = None
    kv_bytes_per_token: Bytes | None = None
    attention_flops_per_position: Bytes | None = None
    generation_config: dict[Text, Setting] = Field(default_factory=dict)
    kv_bytes_per_token_measured: Bytes | None = None
    kv_reserved: Bytes | None = None
    kv_filled: Bytes | None = None
    kv_live: Bytes | None = None
    kv_positions: Bytes | None = None
    kv_pinned: Bytes | None = None
    kv_state: Bytes | None = None
    kv_host: Bytes | None = None
    pages: Number | None = None
    pages_used: Number | None = None
    new_tokens: Bytes | None = None
    unasked_tokens: Bytes | None = None
    padding_tokens: Bytes | None = None


class Idleness(Part):
    """A pipeline stage in generation: the seconds that a replica works, and the share of the time that it waits."""

    stage: RankNumber
    busy_seconds: Seconds
    idle: Rate


class Took(Part):
    """A phase's median seconds per step over `steps` steps, on the rank that is slowest in it."""

    phase: Text
    seconds: Seconds
    steps: Number
    rank: RankNumber = 0


class Percentiles(Part):
    """Seconds at the 50th, 95th and 99th percentile."""

    p50: Seconds
    p95: Seconds
    p99: Seconds


class Latency(Part):
    """Latency of requests that all wait from the start. None: no request had such a wait."""

    first_token_seconds: Percentiles | None = None
    between_tokens_seconds: Percentiles | None = None


class Performance(Part):
    """Seconds, and rates over all ranks.

    `startup_seconds` are those before the first step or batch. Training has the median `step_seconds` of `steps_timed`
    steps; its `tokens_per_second` are those of text, with padding `padded_tokens_per_second`. Generation has the median
    `time_to_first_token_seconds`, and the `generation_seconds` and `compile_seconds` of the slowest replica. Continuous
    batching has its `forwards`, the mean `tokens_per_forward`, and how often a request was `evicted`.
    """

    startup_seconds: Seconds | None = None
    tokens_per_second: Rate | None = None
    padded_tokens_per_second: Rate | None = None
    step_seconds: Seconds | None = None
    steps_timed: Number | None = None
    prefill_tokens_per_second: Rate | None = None
    decode_tokens_per_second: Rate | None = None
    time_to_first_token_seconds: Seconds | None = None
    generation_seconds: Seconds | None = None
    compile_seconds: Seconds | None = None
    latency: Latency = Latency()
    forwards: Bytes | None = None
    tokens_per_forward: Rate | None = None
    evicted: Bytes | None = None
    stages: list[Idleness] | None = None
    phases: list[Took] | None = None


Ceiling = Annotated[float, Field(ge=1, le=1e30)]
"""The most of anything that a device does in a second."""


class Ceilings(Part):
    """The limits of a device: bytes and operations per second, from a page or measured. None: not known."""

    source: Text = ""
    bandwidth: Ceiling | None = None
    flops: Ceiling | None = None
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


@dataclass
class Results:
    """The results of a run, filled while it runs, so that a failed run has them too. None: there is none so far."""

    model: Model | None = None
    pipeline: Pipeline | None = None
    training: Training | None = None
    inference: Inference | None = None
    performance: Performance | None = None
    ceilings: Ceilings | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """The results that there are, by the record's key."""
        return {name: part for name, part in vars(self).items() if part is not None}

    def tree(self) -> dict[str, Any]:
        """The results that there are, as plain data."""
        return {name: part.tree() for name, part in self.parts.items()}
