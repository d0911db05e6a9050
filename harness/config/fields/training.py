"""The fields of training: ZeRO, DeepSpeed, checkpointing, stages and the loop."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from harness.config.fields.kinds import (
    STRICT,
    Beta,
    Count,
    Names,
    NotNegative,
    NotNegativeFloat,
    Number,
    Place,
    Positive,
    PositiveFloat,
    Tokens,
    ZeroStage,
)


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class Deepspeed:
    config: str | None = None
    """Training: a ds_config.json; its keys become the settings that they are."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Other keys of DeepSpeed's config: deepspeed.options.zero_optimization.overlap_comm=true."""


@dataclass(frozen=True, config=STRICT)
class Checkpointing:
    mode: Literal["none", "selective", "full"] = "none"
    """Set by checkpointing=; full keeps a layer's input, selective its matrix products and attention too."""
    layers: list[NotNegative] = Field(default_factory=list)
    """The layers to recompute, from 0, as [0,1]; empty is all."""
    every: Positive = 1
    """Recompute every n-th layer, from the first."""
    offload: Literal["none", "cpu"] = "none"
    """Where what layers keep for backward waits: none is on the device, cpu in its host's memory."""


@dataclass(frozen=True, config=STRICT)
class Loss:
    kind: Literal["full", "chunked", "fused"] = "full"
    """Set by loss=; chunked makes the logits of some tokens at a time, fused in liger-kernel's kernels on a GPU."""
    chunk: Tokens | None = None
    """loss=chunked: tokens whose logits are there at once; null is torch's choice, by vocabulary and hidden size."""


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    kind: Literal["adamw", "adamw_8bit", "adafactor", "muon", "sgd", "lion"] = "adamw"
    """Set by optimizer=; adamw_8bit keeps moments in 8 bits, adafactor a row and a column of each, muon and sgd one."""
    state: Literal["fp32", "bf16"] = "fp32"
    """Of master weights and moments in ZeRO; bf16 rounds each update."""
    momentum: Beta | None = None
    """Of sgd, where null is 0, and of muon, where null is 0.95."""


@dataclass(frozen=True, config=STRICT)
class Adapter:
    kind: Literal["none", "lora", "dora", "qlora"] = "none"
    """Set by adapter=; weights are frozen, qlora packs them into 4 bits; small matrices beside them are trained."""
    rank: Positive = 8
    """The inner size of these matrices."""
    alpha: Positive = 16
    """What they add is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1), Number] = 0.0
    """Share of their inputs left out at random."""
    targets: Names = Field(default_factory=list)
    """Linear layers that get them, by the ends of their names, as [q_proj,v_proj]; empty is all inside the layers."""
    path: Place | None = None
    """Directory of an adapter as peft writes it: to generate with, or to train further."""
    merge: bool = False
    """Write checkpoint/ as a whole model with the adapter merged, and not as an adapter."""


@dataclass(frozen=True, config=STRICT)
class Pipeline:
    stages: Count = 1
    """How many stages the layers are cut into."""
    split: Literal["uniform", "parameters", "memory"] | list[Positive] = "uniform"
    """Layers of each stage: evenly, by parameters, by rehearsed peak, or as [3,5]."""
    groups: Positive | None = None
    """Generation: groups of prompts in flight; null is one a stage."""


@dataclass(frozen=True, config=STRICT)
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
    """The optimizer's highest learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the two means of gradients of AdamW, also beside muon, and of lion, as [0.9,0.95]."""
    epsilon: NotNegativeFloat = 1e-8
    """AdamW's term that keeps a division from 0, also beside muon."""
    warmup_steps: NotNegative = 0
    """Steps from zero to the learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up."""
    weight_decay: NotNegativeFloat = 0.1
    """Weight decay; sgd adds it to the gradient, the others take it from the weights."""
    fused: bool = False
    """adamw, or sgd, in one kernel, without temporaries."""
    compile: bool = False
    """Compile each layer with torch.compile; the results are those of eager layers, but for rounding."""
    optimizer_in_backward: bool = False
    """Update each weight in backward as soon as its gradient is whole, and free that; on one rank, zero=0 in fp32."""
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
