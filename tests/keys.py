"""Holds a written record against its schema."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from harness.record import record_file
from harness.record.fields import Part
from harness.record.schema import Record, parse


def keys_of(part: type[Part], tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The keys in `tree` that `part` and its parts do not know."""
    for key, value in tree.items():
        field = part.model_fields.get(key)
        if field is None:
            yield f"{path}{key}"
            continue
        inside = next(iter(_parts_in(field.annotation)), None)
        if inside is not None and value:
            is_mapping = "dict" in str(field.annotation)
            several = value if isinstance(value, list) else value.values() if is_mapping else [value]
            for each in several:
                yield from keys_of(inside, each, f"{path}{key}.")


def _parts_in(annotation: Any) -> Iterator[type[Part]]:
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for each in get_args(annotation):
        yield from _parts_in(each)


def is_known(directory: Path) -> None:
    """Hold that the schema knows each key of a record, and that reading and writing change nothing."""
    text = (directory / record_file.FILE).read_text()
    tree = record_file.read(directory)
    assert tree.pop("schema") == record_file.SCHEMA
    assert [*keys_of(Record, tree)] == []
    again = directory / "again"
    again.mkdir()
    record_file.write(again, parse(tree, "it"))
    assert (again / record_file.FILE).read_text() == text
