"""Every field of the config: its type, range, default and purpose.

A field's place is its Hydra path (`Settings.train.steps` is `train.steps=`), and its docstring is what `--help` prints.
Nothing here imports torch, so a wrong request is refused within a second.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from harness.config.fields.generation import NEW_TOKENS as NEW_TOKENS
from harness.config.fields.generation import Generation as Generation
from harness.config.fields.kinds import MOST, STRICT, Number, Trackers
from harness.config.fields.machine import Hardware as Hardware
from harness.config.fields.machine import Ledger as Ledger
from harness.config.fields.machine import Network as Network
from harness.config.fields.machine import World as World
from harness.config.fields.model import Data as Data
from harness.config.fields.model import Model as Model
from harness.config.fields.training import Adapter as Adapter
from harness.config.fields.training import Checkpointing as Checkpointing
from harness.config.fields.training import Deepspeed as Deepspeed
from harness.config.fields.training import Loss as Loss
from harness.config.fields.training import Optimizer as Optimizer
from harness.config.fields.training import Pipeline as Pipeline
from harness.config.fields.training import Train as Train
from harness.config.fields.training import Zero as Zero
from harness.config.layout import Layout
from harness.config.refusal import Refusal as Refusal
from harness.config.refusal import as_typed as as_typed


@dataclass(frozen=True, config=STRICT)
class Settings:
    mode: Literal["train", "infer"] = "train"
    """What to run."""
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    """Of parameters, gradients, activations, KV cache; auto is bf16 on GPUs and on CPUs with units for it, else fp32.

    fp8 is bf16 whose linear layers multiply in 8 bits, in training on a GPU.
    """
    seed: Annotated[int, Field(ge=0, lt=2**32), Number] = 0
    """Seed of weights, data order and sampling."""
    tracker: Trackers = Field(default_factory=list)
    """Who else gets a run's figures while it goes on, as wandb or [wandb,mlflow]; offline."""
    model: Model = Model()
    data: Data = Data()
    zero: Zero = Zero()
    deepspeed: Deepspeed = Deepspeed()
    checkpointing: Checkpointing = Checkpointing()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    adapter: Adapter = Adapter()
    pipeline: Pipeline = Pipeline()
    train: Train = Train()
    generation: Generation = Generation()
    ledger: Ledger = Ledger()
    world: World = World()
    hardware: Hardware = Hardware()
    network: Network = Network()

    @property
    def dtype(self) -> str:
        """torch's name of the parameters' precision, which must be resolved: "auto" raises KeyError."""
        return {"bf16": "bfloat16", "fp32": "float32", "fp8": "bfloat16"}[self.precision]

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
