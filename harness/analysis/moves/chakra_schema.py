"""The messages of Chakra's schema (MLCommons, `et_def.proto` 1.0) that a trace of a step needs, and files of them.

Chakra's own library can be installed from its repository alone: the package index has no release of it, and it depends
on a commit of another repository. So protobuf makes the messages from the fields below, which have the numbers and
types of the schema; whatever reads that schema reads them.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

VERSION = "1.0.0"
"""The version of the schema, which a file says first."""

NODES = {"mem-load": 2, "mem-store": 3, "compute": 4, "send": 5, "receive": 6, "collective": 7}
"""NodeType: what a node does."""

COLLECTIVES = {
    "all-reduce": 0,
    "reduce": 1,
    "all-gather": 2,
    "gather": 3,
    "scatter": 4,
    "broadcast": 5,
    "all-to-all": 6,
    "reduce-scatter": 7,
}
"""CollectiveCommType."""

ATTRIBUTES = {
    "is_cpu_op": "bool_val",
    "num_ops": "int64_val",
    "tensor_size": "uint64_val",
    "comm_type": "int64_val",
    "comm_size": "int64_val",
    "comm_src": "int32_val",
    "comm_dst": "int32_val",
    "comm_tag": "int32_val",
    "pg_name": "string_val",
}
"""A node's attributes, and the field that has their value where Chakra's feeder looks for it."""

MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "GlobalMetadata": {"version": (1, "string")},
    "AttributeProto": {
        "name": (1, "string"),
        "int32_val": (7, "int32"),
        "int64_val": (9, "int64"),
        "uint64_val": (13, "uint64"),
        "bool_val": (27, "bool"),
        "string_val": (29, "string"),
    },
    "Node": {
        "id": (1, "uint64"),
        "name": (2, "string"),
        "type": (3, "int32"),  # an enum has the same bytes
        "data_deps": (5, "uint64"),
        "attr": (10, "AttributeProto"),
    },
}
"""Each field's number and type, by message."""


@cache
def messages() -> dict[str, Any]:
    """The classes of the messages, by name. Raises ImportError where there is no protobuf."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="et_def.proto", package="ChakraProtoMsg", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number)
            added.label = kinds.LABEL_REPEATED if field in ("data_deps", "attr") else kinds.LABEL_OPTIONAL
            if kind in MESSAGES:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".ChakraProtoMsg.{kind}"
            else:
                added.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
            if field.endswith("_val"):  # of a choice, also 0 is written
                added.oneof_index = 0
    file.message_type[[*MESSAGES].index("AttributeProto")].oneof_decl.add(name="value")
    pool = descriptor_pool.DescriptorPool()  # one of its own: Chakra's library may be in the same process
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ChakraProtoMsg.{name}"))
        for name in MESSAGES
    }


def node(number: int, name: str, kind: str, after: int | None, **attributes: Any) -> Any:
    """The node `number` of a `kind` in NODES, which waits for the node `after`; None: for none."""
    made = messages()["Node"](id=number, name=name, type=NODES[kind])
    made.data_deps.extend([] if after is None else [after])
    for attribute, value in attributes.items():
        made.attr.add(name=attribute, **{ATTRIBUTES[attribute]: value})
    return made


def write(stream: IO[bytes], nodes: Iterable[Any]) -> None:
    """Write the schema's version, then `nodes`, each after its length. Raises OSError."""
    from google.protobuf import proto

    for message in (messages()["GlobalMetadata"](version=VERSION), *nodes):
        proto.serialize_length_prefixed(message, stream)


def read(file: Path) -> Iterator[Any]:
    """The nodes of a file that `write` has written. Raises OSError, and protobuf's DecodeError."""
    from google.protobuf import proto

    with file.open("rb") as stream:
        proto.parse_length_prefixed(messages()["GlobalMetadata"], stream)
        while (found := proto.parse_length_prefixed(messages()["Node"], stream)) is not None:
            yield found
