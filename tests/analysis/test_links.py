"""What links must carry, from records whose every figure is made up so that the answer is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.analysis.moves import fabric
from harness.analysis.moves.links_model import Machine, Need, Place, needs, shared, turn
from harness.record.schema import parse

Made = dict[str, Any]


def moved(
    phase: str, operation: str, link: str | None, nbytes: int, group: str = "", wire: int | None = None
) -> Made:
    """A transfer of two calls; by ring as much as `wire`."""
    place = {"step": 0, "phase": phase, "micro_batch": 0}
    figures = {"calls": 2, "bytes": nbytes, "by_ring": wire, "ranks": 2 * bool(group)}
    return {**place, **figures, "operation": operation, "group": group, "link": link}


def record_of(
    rows: list[Made] | None, mode: str = "train", size: int = 16, rank: int = 0, passes: int = 1
) -> Made:
    """A record of one rank with these transfers: each phase does 10 GFLOP and moves 1 GB."""
    names = ("forward", "backward", "step") if mode == "train" else ("prefill", "decode")
    work = {
        "step": 0,
        "micro_batch": 0,
        "peak": 1,
        "categories": {},
        "flops": 10**10,
        "read": 10**9,
        "written": 0,
    }
    made = {
        "rank": rank,
        "peak": {"bytes": None, "where": None, "categories": {}},
        "categories": {},
        "phases": [{**work, "phase": name, "passes": passes} for name in names],
        "allocator": {"peak": None, "unattributed": None},
        "traffic": rows,
    }
    return {
        "schema": "harness.record/1",
        "status": "complete",
        "mode": mode,
        "world": {"kind": "rehearsed", "size": size, "device": "cuda", "device_name": "h100-sxm"},
        "model": {"name": "m", "parameters": 1, "dtype": "bfloat16"},
        "config": {"mode": mode, "world": {"per_node": 8, "size": size}},
        "ceilings": {"source": "made", "bandwidth": 1e12, "flops": 1e14, "dtype": "bfloat16"},
        "ranks": [made],
    }


RATES = {"network": 1e9, "nvlink": 1e10}


def of(record: Made, link: str, seconds: float | None = None, computing: float | None = 1.0) -> Need:
    """That link of it; each phase computes for as long."""
    phases = ("forward", "backward", "step", "prefill", "decode")
    found = needs(parse(record, "it"), Machine(RATES, 1e-3, dict.fromkeys(phases, computing)), seconds)
    (actual,) = [each for each in found if each.link == link]
    return actual


@pytest.mark.parametrize(
    ("group", "rank", "rings"),
    [
        ("0-15", 0, 1),  # all eight of the node are in one ring
        ("0-15", 9, 1),
        ("0-56:8", 0, 8),  # one of the node's eight: as many rings
        ("0-60:4", 4, 4),  # two of them
        ("0,8", 8, 8),
        ("0,1,8,9", 1, 4),
    ],
)
def test_a_ring_leaves_a_node_once_and_groups_with_fewer_of_its_ranks_have_more_rings(
    group: str, rank: int, rings: int
) -> None:
    first = rank // 8 * 8
    assert shared(group, Place(rank, range(first, first + 8), range(64))) == rings


@pytest.mark.parametrize("group", ["16-31", "", "all", "0-15:0"])
def test_of_a_group_without_the_rank_nothing_is_known(group: str) -> None:
    assert shared(group, Place(0, range(8), range(64))) is None


def test_a_node_that_is_not_full_has_the_rings_of_its_own_ranks() -> None:
    assert shared("2-10:8", Place(10, range(8, 12), range(12))) == 4


@pytest.mark.parametrize(
    ("node", "stage", "peers"),
    [(range(2, 4), range(1, 2), 0), (range(8), range(4, 8), 4), (range(8, 16), range(32), 8)],
)
def test_messages_are_those_of_the_ranks_of_a_stage_on_a_node(node: range, stage: range, peers: int) -> None:
    assert Place(node.start, node, stage).peers == peers


def test_a_node_sends_what_its_rings_do_and_a_direction_has_its_own_bytes() -> None:
    rows = [
        moved("forward", "all-gather", "network", 1600, "0-15", 1500),
        moved("backward", "send", "network", 100, "0,8"),
        moved("backward", "receive", "network", 300, "0,8"),
    ]
    network = of(record_of(rows), "network", seconds=2.0)
    assert network.of_rank == 1500 + 300
    assert network.bytes == 1500 + 8 * 300
    assert network.needed == network.bytes / 2
    assert network.calls == 6
    assert network.at_best == pytest.approx(network.bytes / 1e9 + 6 * 1e-3)
    assert network.share == pytest.approx(network.bytes / 2 / 1e9)


def test_the_rank_that_moves_most_is_the_one_that_counts() -> None:
    record = record_of([moved("forward", "all-gather", "nvlink", 20, "0-1", 10)])
    other = record_of([moved("forward", "all-gather", "nvlink", 40, "2-3", 20)], rank=2)
    record["ranks"] += other["ranks"]
    assert (of(record, "nvlink").rank, of(record, "nvlink").bytes) == (2, 20)


def test_what_may_hide_is_no_longer_than_its_phase_and_what_operators_wait_for_hides_nothing() -> None:
    rows = [
        moved("forward", "all-gather", "nvlink", 1, "0-1", 5 * 10**10),  # 5 s
        moved("backward", "reduce-scatter", "nvlink", 1, "0-1", 10**9),  # 0.1 s
        moved("backward", "send", "nvlink", 2 * 10**10, "0,1"),  # 2 s
        moved("step", "all-gather", "nvlink", 1, "0-1", 10**10),  # 1 s
    ]
    nvlink = of(record_of(rows), "nvlink", computing=3.0)
    assert nvlink.at_best == pytest.approx(5 + 2.1 + 1)
    assert nvlink.hidden == pytest.approx(3 + 0.1)
    assert nvlink.shown == pytest.approx(5)
    shared_layer = record_of([moved("decode", "all-reduce", "nvlink", 100, "0,1", 100)], "infer")
    assert of(shared_layer, "nvlink").hidden == 0.0


def test_decoding_is_counted_by_the_step() -> None:
    rows = [
        moved("prefill", "all-reduce", "nvlink", 10**9, "0,1", 10**9),
        moved("decode", "all-reduce", "nvlink", 630, "0,1", 630),
    ]
    nvlink = of(record_of(rows, "infer", passes=63), "nvlink")
    assert (nvlink.bytes, nvlink.calls) == (10, 2 / 63)


def test_what_is_not_known_is_none_and_never_0() -> None:
    rows = [
        moved("forward", "all-gather", "nvlink", 20, "0-1", 10),
        moved("forward", "all-gather", "network", 20, "0-15", None),
        moved("forward", "all-gather", None, 20, "0-15", 10),
        moved("data", "read", "storage", 20),
    ]
    record = record_of(rows)
    nvlink, network, unknown, storage = (
        of(record, link, computing=None) for link in ("nvlink", "network", "unknown", "storage")
    )
    assert (nvlink.needed, nvlink.share, nvlink.hidden, nvlink.shown) == (None,) * 4
    assert (network.bytes, network.at_best) == (None, None)
    assert (unknown.bytes, unknown.at_best, unknown.hidden) == (10, None, None)
    assert (storage.bytes, storage.at_best, storage.hidden) == (20, None, None)


def test_the_batch_from_which_a_link_bounds_decoding_is_where_both_take_as_long() -> None:
    weights, cache, wire = 1000.0, 2.0, 5.0
    one, other = ((batch, wire * batch, weights + cache * batch) for batch in (1.0, 32.0))
    # 5 B / 10 = (1000 + 2 B) / 20 at 125 sequences
    assert turn(one, other, link=10, memory=20) == pytest.approx(125)
    # 10 + 5 B / 10 = (1000 + 2 B) / 20 at 100
    assert turn(one, other, link=10, memory=20, waiting=10) == pytest.approx(100)
    assert turn(one, other, link=100, memory=20) == float("inf")  # 0.05 s a sequence are less than 0.1
    assert turn(one, other, link=10, memory=20, waiting=60) == 1.0  # latency alone is longer


SUPERPODS = [
    (64, 64, 16, 8, 512),
    (64, 128, 32, 16, 1024),
    (64, 256, 64, 32, 2048),
    (144, 72, 8, 4, 576),
    (144, 288, 32, 18, 2304),
    (144, 576, 64, 36, 4608),
]
"""Ports of a switch, nodes, leaves, spines, links of each layer: NVIDIA's tables for its B200 and B300 SuperPODs."""


@pytest.mark.parametrize(("radix", "nodes", "leaves", "spines", "links"), SUPERPODS)
def test_a_network_of_two_layers_is_nvidia_s(
    radix: int, nodes: int, leaves: int, spines: int, links: int
) -> None:
    number = {each.what: each.number for each in fabric.bill(fabric.Fabric(400, radix, 2), nodes, 8)}
    assert (number["leaves"], number["spines"]) == (leaves, spines)
    assert (number["links to leaves"], number["links to spines"]) == (links, links)
    assert number["ports of switches in use"] == 3 * links
    assert (number["transceivers of 400G"], number["transceivers of 800G"]) == (links, 3 * links // 2)


def test_each_leaf_has_as_many_links_to_each_spine() -> None:
    """NVIDIA's H100 SuperPOD of 95 nodes: its 24 leaves would fit on 12 spines, and 32 links do not divide by 12."""
    number = {each.what: each.number for each in fabric.bill(fabric.Fabric(400, 64, 2), 95, 8)}
    assert (number["leaves"], number["spines"], number["links to spines"]) == (24, 16, 768)


def test_one_switch_is_enough_for_as_many_ports_as_it_has() -> None:
    number = {each.what: each.number for each in fabric.bill(fabric.Fabric(800, 64, 1), 8, 8)}
    assert (number["switches"], number["links"], number["transceivers of 800G"]) == (1, 64, 128)
    assert "spines" in {each.what for each in fabric.bill(fabric.Fabric(800, 64, 1), 9, 8)}


ToolOutput = Callable[..., str]


@pytest.fixture
def output_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> ToolOutput:
    """What the tool prints of a record."""

    def run(record: Made | None, *options: str, code: int = 0) -> str:
        if record is not None:
            (tmp_path / "record.json").write_text(json.dumps(record))
        words = [str(tmp_path)] if record is not None else []
        assert main(["links", *words, *options]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


GATHERED = record_of([moved("forward", "all-gather", "network", 1600, "0-15", 1500)])


def test_the_tool_holds_a_run_against_a_network_and_prices_it(output_of: ToolOutput) -> None:
    said = output_of(
        GATHERED, "--step-seconds", "1e-9", "--network", "infiniband-hdr200", "--hardware", "h100-sxm"
    )
    assert "network bounds the step: it needs 7.5 times the rate that it has." in said
    assert "400G, switches of 64 ports, one layer" in said
    found = json.loads(output_of(GATHERED, "--json", "--network", "infiniband-hdr200"))
    (network,) = found["links"]
    assert (network["needed"], network["share"]) == (None, None)
    assert network["at_best"] == pytest.approx(1500 / 2e11 + 2 * 2.7e-6)
    assert (found["bill"]["nodes"], found["bill"]["gpus"]) == (2, 8)


def test_names_in_a_record_s_config_are_printed_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = record_of([moved("forward", "all-reduce", "network", 10**6, "0-15", 10**6)])
    made["config"] |= {"hardware": {"name": "\x1b[2Jcard", "link": 9e11}, "network": {"name": "\x07net"}}
    (tmp_path / "record.json").write_text(json.dumps(made))
    assert main(["links", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "card" in said
    assert all(character.isprintable() or character == "\n" for character in said)


def test_a_network_is_priced_without_a_run_each_figure_with_its_formula(output_of: ToolOutput) -> None:
    said = output_of(None, "--nodes", "128", "--gpus", "8")
    for words in ("128 nodes x 8 GPUs", "ceil(1,024 / 32)", "32 leaves x 32", "two layers"):
        assert words in said
    assert "two layers of switches of 64 ports take 2,048 at most" in output_of(
        None, "--nodes", "500", "--gpus", "8"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--step-seconds", "-1"), "-1: should be seconds from"),
        (("--step-seconds", "nan"), "nan: should be seconds from"),
        (("--step-seconds", "soon"), "soon: should be seconds from"),
        (
            ("--network", "token-ring"),
            "network=token-ring: no page with a bandwidth has that name; one of aws-efa-p4d",
        ),
        (("--hardware", "abacus"), "hardware=abacus: no page with rates has that name; one of a100-40gb"),
        (("--nodes", "2"), "--nodes and --gpus go together"),
        (("--nodes", "0", "--gpus", "8"), "0: should be a whole number"),
    ],
)
def test_what_is_wrong_is_a_sentence(output_of: ToolOutput, options: tuple[str, ...], sentence: str) -> None:
    assert sentence in output_of(GATHERED, *options, code=2)


def test_what_is_missing_or_too_much_is_a_sentence(output_of: ToolOutput) -> None:
    assert "has no traffic in its record" in output_of(record_of(None), code=2)
    assert "give a RUN" in output_of(None, code=2)
    assert "is about a run" in output_of(None, "--nodes", "2", "--gpus", "8", "--step-seconds", "1", code=2)
    assert "two layers of switches of 128 ports take 8,192 at most" in output_of(
        None, "--nodes", "1025", "--gpus", "8", code=2
    )
