"""The fields of `model` and `data`."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from harness.config.fields.kinds import STRICT, Place


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class Data:
    kind: Literal["stdlib", "text", "hub", "chat"] = "stdlib"
    """Set by data=."""
    name: str | None = None
    """data=hub: the dataset's name."""
    path: Place | None = None
    """data=text or data=chat: a file, a directory or a quoted glob."""
    split: str = "train"
    """data=hub: the split."""
    column: str = "text"
    """data=hub: the column that has the text."""
    streaming: bool = False
    """data=hub: read the data during the run and store nothing."""
    packing: bool = True
    """Training: cut sequences from documents end to end; false pads each document to train.sequence."""
    tokenizer: Place | None = None
    """Replaces the model's own tokenizer; without either, bytes are tokens."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the text held out for validation."""
    cache_dir: Place | None = None
    """Where token files are kept; null is the default of the datasets library."""
