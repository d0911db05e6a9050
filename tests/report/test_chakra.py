"""Chakra's traces have the record's bytes, by Chakra's schema, and all ranks get through them together."""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.analysis.moves import chakra, chakra_schema
from harness.analysis.moves.transfers import members, of_step, phases_of_step
from harness.record.memory import Transfer
from harness.record.record_file import read
from harness.record.schema import Record, parse
from tests.report.conftest import INFER
from tests.report.test_report import changed

WRITTEN = bytes.fromhex(
    "070a05312e302e305c08011215666f727761726420302c20616c6c2d72656475636518072a0100520e0a0969735f6370"
    "755f6f70d80100520d0a09636f6d6d5f747970654800520e0a09636f6d6d5f73697a6548ac02520d0a0770675f6e616d"
    "65ea010132620802120f666f727761726420302c2073656e6418052a0101520e0a0969735f6370755f6f70d80100520c"
    "0a08636f6d6d5f7372633800520c0a08636f6d6d5f6473743804520c0a08636f6d6d5f7461673800520e0a09636f6d6d"
    "5f73697a6548ac0236120c6461746120302c20726561641802520e0a0969735f6370755f6f70d8010052140a0b74656e"
    "736f725f73697a6568808080808020"
)
"""What Chakra's own classes and its protolib.py write for `SAME`: made with et_def.proto of version 1.0.0."""

SAME: tuple[dict[str, Any], ...] = (
    {"kind": "collective", "name": "forward 0, all-reduce", "comm_type": 0, "comm_size": 300, "pg_name": "2"},
    {
        "kind": "send",
        "name": "forward 0, send",
        "comm_src": 0,
        "comm_dst": 4,
        "comm_tag": 0,
        "comm_size": 300,
    },
    {"kind": "mem-load", "name": "data 0, read", "tensor_size": 2**40},
)

SENT = ("send", "receive")

Trace = list[dict[str, Any]]


def test_the_bytes_are_those_of_chakra_s_own_library() -> None:
    numbers, after = (1, 2, 0), (0, 1, None)
    nodes = [
        chakra_schema.node(number, after=waits, is_cpu_op=False, **each)
        for number, waits, each in zip(numbers, after, SAME, strict=True)
    ]
    stream = BytesIO()
    chakra_schema.write(stream, nodes)
    assert stream.getvalue() == WRITTEN


def exported(run: Path, directory: Path) -> dict[int, Trace]:
    """Each rank's nodes, as `report --chakra` writes them."""
    assert main(["report", str(run), "-o", str(directory), "--chakra"]) == 0
    files = {int(file.suffixes[0][1:]): file for file in (directory / "chakra").glob("*.et")}
    return {
        number: [plain(node) for node in chakra_schema.read(file)] for number, file in sorted(files.items())
    }


def plain(node: Any) -> dict[str, Any]:
    values = {each.name: getattr(each, each.WhichOneof("value")) for each in node.attr}
    kinds = {number: kind for kind, number in chakra_schema.NODES.items()}
    return {
        "id": node.id,
        "name": node.name,
        "kind": kinds[node.type],
        "after": list(node.data_deps),
        **values,
    }


@pytest.fixture(scope="module")
def traces(
    runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Record, Path, dict[int, Trace]]]:
    """By name, runs with their traces: also one whose stages send tokens to and fro."""
    home = tmp_path_factory.mktemp("chakra")
    words = [*INFER.split(), "world.size=4", "pipeline.stages=2", f"hydra.run.dir={home / 'staged'}"]
    assert main(words) == 0
    paths = {**runs, "staged": home / "staged"}
    return {
        name: (parse(read(run), name), home / f"report-{name}", exported(run, home / f"report-{name}"))
        for name, run in paths.items()
    }


RUNS = pytest.mark.parametrize("name", ["train", "infer", "staged"])


@RUNS
def test_every_rank_has_the_bytes_and_the_work_of_the_record(name: str, traces: dict[str, Any]) -> None:
    record, _, of_rank = traces[name]
    assert sorted(of_rank) == list(range(record.world.size))
    for rank in record.ranks:
        rows = of_step(record, rank)
        assert rows is not None
        for number in rank.numbers:
            assert moved(of_rank[number]) == recorded(rows)
            phases = phases_of_step(record, rank)
            worked = sum(node.get("num_ops", 0) for node in of_rank[number])
            assert worked == sum(each.flops or 0 for each in phases)


def moved(trace: Trace) -> Counter[tuple[str, str]]:
    """Bytes by phase and operation. Of an all-gather a node has one rank's part."""
    total: Counter[tuple[str, str]] = Counter()
    for node in trace:
        if node["kind"] != "compute":
            phase, operation = node["name"].split(", ")
            total[phase, operation] += node["comm_size"] if "comm_size" in node else node["tensor_size"]
    return total


def recorded(rows: list[Transfer]) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for row in rows:
        part = row.ranks if row.operation in ("all-gather", "gather") else 1
        assert row.bytes % part == 0
        total[f"{row.phase} {row.micro_batch}", row.operation] += row.bytes // part
    return total


@RUNS
def test_every_node_waits_for_the_one_before_it_and_phases_keep_their_order(
    name: str, traces: dict[str, Any]
) -> None:
    record, _, of_rank = traces[name]
    for trace in of_rank.values():
        assert [node["after"] for node in trace] == [[], *([number] for number in range(len(trace) - 1))]
    order = dict.fromkeys(node["name"].split(", ")[0] for node in of_rank[0])
    known = [f"{each.phase} {each.micro_batch}" for each in phases_of_step(record, record.ranks[0])]
    assert list(order) == [each for each in known if each in order]


@RUNS
def test_all_ranks_get_through_their_traces_together(name: str, traces: dict[str, Any]) -> None:
    _, directory, of_rank = traces[name]
    groups = json.loads((directory / "chakra" / chakra.GROUPS).read_text())
    assert replayed(of_rank, groups) == {}


def replayed(of_rank: dict[int, Trace], groups: dict[str, list[int]]) -> dict[int, dict[str, Any]]:
    """What each rank waits for when nothing goes on: nothing, where each ran all of its nodes."""
    waiting = {number: iter(trace) for number, trace in of_rank.items()}
    at = {number: next(nodes, None) for number, nodes in waiting.items()}
    sent: dict[tuple[int, ...], int] = defaultdict(int)

    def ready(number: int, node: dict[str, Any]) -> Iterator[int]:
        """The ranks that go on, if they can."""
        if node["kind"] == "collective":
            group = groups[node["pg_name"]] if "pg_name" in node else [*of_rank]
            said = {
                (each and each.get("comm_type"), each and each.get("comm_size"))
                for each in map(at.get, group)
            }
            assert number in group
            yield from group if said == {(node["comm_type"], node["comm_size"])} else ()
        elif node["kind"] == "receive":
            message = node["comm_src"], node["comm_dst"], node["comm_tag"], node["comm_size"]
            if sent[message]:
                sent[message] -= 1
                yield number
        else:
            if node["kind"] == "send":
                sent[node["comm_src"], node["comm_dst"], node["comm_tag"], node["comm_size"]] += 1
            yield number

    going = True
    while going:
        going = False
        for number in of_rank:
            node = at[number]
            for other in [*ready(number, node)] if node else ():
                at[other], going = next(waiting[other], None), True
    assert not any(sent.values())
    return {number: node for number, node in at.items() if node is not None}


@pytest.mark.parametrize(
    ("group", "own", "other", "expected"),
    [
        ("0-7", 0, 5, "0-7"),
        ("0,1", 0, 6, "6,7"),
        ("0-6:2", 0, 3, "1-7:2"),
        ("0-6:2", 0, 9, "9-15:2"),
        ("4-7", 5, 13, "12-15"),
        ("0,4", 0, 3, "3,7"),
        ("0,1,4,5", 0, 2, None),
        ("2-5", 2, 6, None),
        ("0,0", 0, 6, None),
    ],
)
def test_groups_of_ranks_that_were_not_rehearsed_lie_beside(
    group: str, own: int, other: int, expected: str | None
) -> None:
    row = Transfer(
        step=0, phase="step", micro_batch=0, operation="all-reduce", group=group, ranks=2, calls=1, bytes=8
    )
    actual = chakra.peers(row, own, other)
    assert actual == (None if expected is None else tuple(members(expected)))


def test_messages_of_a_rank_that_was_not_rehearsed_go_as_far() -> None:
    row = Transfer(
        step=0, phase="step", micro_batch=0, operation="send", group="4,8", ranks=2, calls=1, bytes=8
    )
    assert chakra.peers(row, 4, 7) == (7, 11)


def test_ranks_whose_groups_cannot_be_derived_are_named_and_have_no_trace(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(record: dict[str, Any]) -> None:
        record["world"]["size"] = 8
        (first, *_) = record["ranks"]
        record["ranks"] = [first | {"stands_for": [0, 2], "bounds": [1]}]
        for row in first["traffic"]:
            row |= {"group": "0,1,5", "ranks": 3} if row["group"] else {}

    of_rank = exported(changed(runs["train"], tmp_path / "run", change), tmp_path / "report")
    assert sorted(of_rank) == [0, 1]
    said = capsys.readouterr().err
    assert "ranks 1 were not rehearsed" in said
    assert "ranks 2-7 have no trace" in said


def test_more_calls_than_a_disk_has_room_for_are_a_sentence(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(record: dict[str, Any]) -> None:
        for row in record["ranks"][0]["traffic"]:
            row["calls"] = 2**90

    run = changed(runs["train"], tmp_path / "run", change)
    assert main(["report", str(run), "-o", str(tmp_path / "report"), "--chakra"]) == 2
    assert "calls in a step, and a trace at most 1,000,000" in capsys.readouterr().err


def test_work_that_was_not_counted_has_no_node(runs: dict[str, Path], tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        for rank in record["ranks"]:
            for phase in rank["phases"]:
                phase["flops"] = None

    of_rank = exported(changed(runs["train"], tmp_path / "run", change), tmp_path / "report")
    assert not any(node["kind"] == "compute" for trace in of_rank.values() for node in trace)


def test_without_protobuf_it_says_how_to_get_it(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    chakra_schema.messages.cache_clear()
    assert main(["report", str(runs["train"]), "-o", str(tmp_path / "report"), "--chakra"]) == 2
    assert "pip install 'harness[chakra]'" in capsys.readouterr().err


def test_traffic_that_was_not_counted_is_no_trace_of_nothing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = changed(
        runs["train"], tmp_path / "run", lambda record: [rank.pop("traffic") for rank in record["ranks"]]
    )
    assert main(["report", str(run), "-o", str(tmp_path / "report"), "--chakra"]) == 2
    assert "its record has no traffic" in capsys.readouterr().err
    assert not (tmp_path / "report" / "chakra").exists()
