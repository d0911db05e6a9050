"""The types of a record's fields, and the base of its parts."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

FROM_DISK = {"from_disk": True}
"""The context of a validation whose texts are not trusted."""


def printable(text: str) -> str:
    """`text` without characters that control a terminal: control characters, line ends, changes of direction."""
    return "".join(character if character.isprintable() else "?" for character in text)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a config or another nested mapping, by its path `a.b`. An empty mapping is a leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _printable_from_disk(text: str, info: ValidationInfo) -> str:
    return printable(text) if info.context else text


Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Difference = Annotated[int, Field(gt=-(2**63), lt=2**63)]
"""Bytes that may be below 0."""
Number = Annotated[int, Field(ge=0, lt=2**31)]
Index = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""The number that a loop gives its step or micro-batch."""
Operations = Annotated[int, Field(ge=0, lt=2**100)]
"""Floating-point operations, or bytes moved by all of a phase's operators. They have no natural limit."""
Seconds = Annotated[float, Field(ge=0)]
Text = Annotated[str, AfterValidator(_printable_from_disk)]
"""A text. One that is read from disk is printable."""
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
