"""Snapshots: torch's own tools read them, and the page of memory_viz can."""

import pickletools
from pathlib import Path
from typing import Any

import pytest
from torch.cuda import _memory_viz

from harness.device.allocator_settings import MIB, parse
from harness.device.snapshot import snapshot, timed, write
from harness.ledger.events import Event, Storage, Where

WHERE = Where(0, "forward", 0)

UNDERSTOOD = {
    *(
        "APPEND",
        "APPENDS",
        "BINFLOAT",
        "BINGET",
        "BININT",
        "BININT1",
        "BININT2",
        "BINPUT",
        "BINUNICODE",
        "DICT",
    ),
    *(
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_TUPLE",
        "FRAME",
        "LIST",
        "LONG1",
        "LONG_BINGET",
        "LONG_BINPUT",
        "MARK",
    ),
    *("MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}
"""The opcodes that `unpickle` in torch's MemoryViz.js knows."""


def storage(mib: int, **known: Any) -> Storage:
    return Storage(mib * MIB, 0, 0, WHERE, "layers.0.mlp", "aten.mm", "activations", **known)


def history() -> list[Event]:
    """5 is born, 30 is born, 5 dies, 3 is born: 20 with 3 in it, and 30."""
    a, b, c = storage(5, line="/home/me/train.py:12"), storage(30), storage(3, name="weight")
    steps = [(a, 1), (b, 1), (a, -1), (c, 1)]
    return [
        Event(time * 1_000_000, sign * each.nbytes, each, WHERE, "")
        for time, (each, sign) in enumerate(steps)
    ]


@pytest.mark.parametrize("text", ["", "expandable_segments:True"])
def test_torch_adds_up_the_segments(text: str) -> None:
    """5 and 30 need two pages of 20 MiB where segments expand, otherwise 20 and 30."""
    reserved, segments = (40, 1) if text else (50, 2)
    said = _memory_viz.segsum(snapshot(timed(history()), parse(text)))
    assert f"segments: {segments}\n" in said
    assert f"total_reserved: {reserved}.0MiB\n" in said
    assert "total_allocated: 33.0MiB\n" in said


def test_torch_tells_the_history() -> None:
    taken = snapshot(timed(history()), parse(""), limit=60 * MIB)
    said = _memory_viz.trace(taken).splitlines()
    assert [line.partition(" ")[2] for line in said if "cudaMalloc" in line] == [
        f"= cudaMalloc({2 * MIB}, 20.0MiB)",
        f"= cudaMalloc({22 * MIB}, 30.0MiB)",
    ]
    assert sum(line.startswith("del ") for line in said) == 1
    assert [each["action"] for each in taken["device_traces"][0]] == [
        *("segment_alloc", "alloc", "segment_alloc", "alloc", "free_requested", "free_completed", "alloc"),
        "snapshot",
    ]
    assert [each["time_us"] for each in taken["device_traces"][0]] == [
        0,
        0,
        1000,
        1000,
        2000,
        2000,
        3000,
        3000,
    ]


def test_frames_name_the_operator_the_line_the_module_and_the_category() -> None:
    taken = snapshot(timed(history()), parse(""))
    first = next(each for each in taken["device_traces"][0] if each["action"] == "alloc")
    assert [(each["filename"], each["line"], each["name"]) for each in first["frames"]] == [
        ("operator", 0, "aten.mm"),
        ("/home/me/train.py", 12, "aten.mm"),
        ("module", 0, "layers.0.mlp"),
        ("activations", 0, "forward"),
    ]
    lines = _memory_viz.segments(taken, format_flamegraph=str).splitlines()
    prefix = f"stream_0;seg_{2 * MIB};active_allocated;"
    assert f"{prefix}activations:0:weight;module:0:layers.0.mlp;operator:0:aten.mm {3 * MIB}" in lines


def test_a_history_ends_where_memory_is_out() -> None:
    taken = snapshot(timed(history()), parse(""), limit=40 * MIB)
    last = taken["device_traces"][0][-2]
    assert (last["action"], last["size"], last["device_free"]) == ("oom", 30 * MIB, 20 * MIB)
    assert "raise OutOfMemoryError # 30.0MiB requested, 20.0MiB free in CUDA" in _memory_viz.trace(taken)
    assert [each["total_size"] for each in taken["segments"]] == [20 * MIB]


def test_a_part_that_is_mapped_is_a_segment() -> None:
    """50, 30 and 10 map 100. A small request needs 2 more: of the 30 that are free, the page from 60 to 80 goes."""
    first, freed, last, small = storage(50), storage(30), storage(10), storage(1)
    events = [
        *(Event(0, each.nbytes, each, WHERE, "") for each in (first, freed, last)),
        Event(1, -freed.nbytes, freed, WHERE, ""),
        Event(2, small.nbytes, small, WHERE, ""),
    ]
    segments = snapshot(timed(events), parse("expandable_segments:True"), limit=100 * MIB)["segments"]
    assert [(each["total_size"] // MIB, each["segment_type"]) for each in segments] == [
        (60, "large"),
        (20, "large"),
        (2, "small"),
    ]
    assert segments[1]["address"] == segments[0]["address"] + 80 * MIB


def test_the_page_finds_the_category_that_it_looks_for() -> None:
    """MemoryViz.js colours by category, and calls a list that is not there where no entry is `unknown`."""
    categories = {each["category"] for each in snapshot([], parse(""))["device_traces"][0]}
    assert categories == {"unknown"}


def test_the_page_s_own_reader_knows_every_opcode_of_the_file(tmp_path: Path) -> None:
    long_name = storage(3, name="x" * 300)
    born = [Event(number, MIB, storage(1, name=f"w{number}"), WHERE, "") for number in range(300)]
    taken = snapshot(timed([Event(0, 3 * MIB, long_name, WHERE, ""), *born]), parse("max_split_size_mb:200"))
    write(tmp_path / "snapshot.pickle", taken)
    opcodes = {code.name for code, _, _ in pickletools.genops((tmp_path / "snapshot.pickle").read_bytes())}
    assert opcodes - UNDERSTOOD == set()
    assert {"LONG_BINGET", "BINUNICODE", "TUPLE2"} <= opcodes


def test_a_snapshot_has_the_keys_that_torch_documents() -> None:
    """They are in the docstring of `torch.cuda.memory._snapshot`."""
    taken = snapshot(timed(history()), parse(""))
    segment = taken["segments"][0]
    assert {
        "address",
        "total_size",
        "stream",
        "segment_type",
        "segment_pool_id",
        "allocated_size",
    } <= segment.keys()
    assert {"size", "requested_size", "address", "state", "frames"} == segment["blocks"][0].keys()
    assert {"action", "addr", "frames", "size", "stream", "pool_id"} <= taken["device_traces"][0][0].keys()
