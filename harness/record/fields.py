"""The types of a record's fields, and the base of its parts."""

from collections.abc import Iterator, Mapping
from reprlib import Repr
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from harness.config.refusal import printable as printable

T = TypeVar("T")

FROM_DISK = {"from_disk": True}
"""The context of a validation whose texts are not trusted."""


def short_repr(value: Any) -> str:
    """`value` as Python writes it, in at most 40 printable characters."""
    short = Repr()  # the plain repr fails for a value of many levels
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 3, 40, 40, 40
    text = printable(short.repr(value))
    return text if len(text) <= 40 else f"{text[:37]}..."


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a config or another nested mapping, by its path `a.b`. An empty mapping is a leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _printable_from_disk(text: str, info: ValidationInfo) -> str:
    return printable(text) if info.context else text


def _not_deep(tree: Any) -> Any:
    """Raise ValueError for a tree that no function can walk which calls itself."""
    nodes = [(tree, 0)]
    while nodes:
        node, depth = nodes.pop()
        if depth > DEEPEST:
            raise ValueError(f"should be at most {DEEPEST} levels deep")
        if isinstance(node, Mapping | list):
            children = node.values() if isinstance(node, Mapping) else node
            nodes += [(each, depth + 1) for each in children if isinstance(each, Mapping | list)]
    return tree


DEEPEST = 32
"""The most levels of a value whose fields nobody lists, as a config's."""

Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Difference = Annotated[int, Field(gt=-(2**63), lt=2**63)]
"""Bytes that may be below 0."""
Number = Annotated[int, Field(ge=0, lt=2**31)]
Index = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""The number that a loop gives its step or micro-batch."""
Operations = Annotated[int, Field(ge=0, lt=2**100)]
"""Floating-point operations, or bytes moved by all of a phase's operators. They have no natural limit."""
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Rate = Annotated[float, Field(ge=0, le=1e30)]
"""A number of anything a second, or a number without a unit."""
Share = Annotated[float, Field(ge=0, le=1)]
RankNumber = Annotated[int, Field(ge=0, lt=2**20)]
"""The number of a rank, or of a pipeline stage."""
Text = Annotated[str, AfterValidator(_printable_from_disk)]
"""A text. One that is read from disk is printable."""
Open = Annotated[T, AfterValidator(_not_deep)]
"""A value whose fields nobody lists: they belong to a config, and may be anything that JSON has."""
Figures = Mapping[str, int | None]
"""Bytes by category. None: not measured."""


class Part(BaseModel):
    """A part of a record. Its producer sets the fields that it knows; the others are absent from the file.

    The keys of the file are the fields, in their order. A file may have further keys, from a newer version.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    def tree(self) -> dict[str, Any]:
        """The fields that were set, as plain data."""
        return self.model_dump(exclude_unset=True)

    def plus(self, **fields: Any) -> Self:
        """A copy with these fields set. Raises TypeError for a field that there is not, ValueError for a value."""
        if unknown := fields.keys() - type(self).model_fields.keys():
            raise TypeError(f"{type(self).__name__} has no field {min(unknown)}")
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | fields)
