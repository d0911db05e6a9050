"""The kinds of values that fields take: their types, and their ranges."""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

MOST = 2**53 - 1
"""The largest number allowed. Up to here JSON, doubles and 64-bit integers agree, and no library counter overflows."""


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number, and no true or false")
    return value


Number = BeforeValidator(_no_truth)
Positive = Annotated[int, Field(ge=1, le=MOST), Number]
Count = Annotated[int, Field(ge=1, le=2**20), Number]
"""A number of things that a run, or its rehearsal, has one by one. No run has a million of them at once."""
Tokens = Annotated[int, Field(ge=1, lt=2**31), Number]
"""A number of tokens, or of what has some: torch counts their bytes in 64 bits."""
NotNegative = Annotated[int, Field(ge=0, le=MOST), Number]
ZeroStage = Annotated[int, Field(ge=0, le=3), Number]
PositiveFloat = Annotated[float, Field(gt=0, le=1e30), Number]
NotNegativeFloat = Annotated[float, Field(ge=0, le=1e30), Number]


def _above_zero(value: float) -> float:
    if value > 0:
        return value
    raise ValueError("should be greater than 0; generation.sample=false takes the likeliest token")


Beta = Annotated[float, Field(ge=0, lt=1), Number]

Temperature = Annotated[float, Field(le=1e30), AfterValidator(_above_zero), Number]


def _of_home(path: str) -> str:
    return os.path.expanduser(path)


Place = Annotated[str, AfterValidator(_of_home)]
"""A path. A leading ~ is the home directory, ~NAME that of a user; a file named so is ./~."""

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, use_attribute_docstrings=True)


def _names(value: object) -> object:
    """The names of a list that may be written as one name, or as none."""
    if value is None or value == "none":
        return []
    if not isinstance(value, list):
        return [value]
    return list(dict.fromkeys(value)) if all(isinstance(each, str) for each in value) else value


Names = Annotated[list[str], BeforeValidator(_names)]
Trackers = Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], BeforeValidator(_names)]
