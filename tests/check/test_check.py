"""The gate: what it lets through, what it stops and with which words, and what it refuses to judge."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from harness import check
from harness.__main__ import main
from harness.check import announce, baseline
from harness.check.tolerance import tolerances
from harness.ledger.categories import CATEGORIES
from harness.record import record_file
from harness.record.schema import parse
from harness.runtime import faults

ROOT = Path(__file__).parents[2]
KIB = 1024
WORDS = ["mode=train", "model=tiny", "hardware=cpu", "zero=2"]
PLACES = [(0, "setup", 0), (0, "forward", 0), (0, "backward", 0), (1, "forward", 0), (1, "forward", 1)]
QUICK = [
    *("mode=infer", "model=tiny", "hardware=cpu", "model.config.num_hidden_layers=2"),
    *(
        "generation.batch=1",
        "generation.count=1",
        "generation.prompt_length=4",
        "generation.max_new_tokens=2",
    ),
]

Gate = Callable[..., int]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a directory of its own, and whatever runs it is not GitHub."""
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


def rank_of(numbers: list[int], **measured: int) -> dict[str, Any]:
    """A rank that holds the same in every phase; its activations also by name."""
    categories = {**dict.fromkeys(CATEGORIES, 0), "parameters": 2 * KIB, "activations": 4 * KIB, **measured}
    total = sum(categories.values())
    where = {"step": 0, "phase": "forward", "micro_batch": 0, "module": "layers.3", "op": "mm.default"}
    layers = [
        {
            "category": "activations",
            "name": f"layers.{n}.mlp: mm",
            "bytes": categories["activations"] // 2,
            "storages": 1,
        }
        for n in (0, 1)
    ]
    return {
        "rank": numbers[0],
        "stage": 0,
        "stands_for": numbers,
        "peak": {
            "bytes": total,
            "where": where,
            "categories": {**categories, "kernel": None},
            "holdings": layers,
        },
        "categories": {name: {"peak": bytes_, "end": bytes_ // 2} for name, bytes_ in categories.items()},
        "phases": [
            {
                "step": s,
                "phase": p,
                "micro_batch": m,
                "peak": total,
                "end": total,
                "categories": dict(categories),
            }
            for s, p, m in PLACES
        ],
        "allocator": {"source": None, "peak": None, "unattributed": None},
    }


def record_of(*ranks: dict[str, Any], size: int | None = None) -> dict[str, Any]:
    """A run of WORDS, as its record is."""
    books = [*ranks] or [rank_of([0, 1])]
    return {
        "schema": "harness.record/1",
        "status": "complete",
        "mode": "train",
        "world": {
            "kind": "torchrun",
            "size": size or sum(len(r["stands_for"]) for r in books),
            "device": "cpu",
        },
        "model": {"name": "tiny", "parameters": 3098880, "dtype": "bfloat16"},
        "config": {
            "ledger": {"steps": 3},
        },
        "environment": {"command": [*WORDS, "hydra.run.dir=/somewhere"], "packages": {"torch": "2.13.0"}},
        "ranks": books,
    }


def put(record: dict[str, Any], name: str = "run") -> str:
    Path(name).mkdir(parents=True, exist_ok=True)
    (Path(name) / "record.json").write_text(json.dumps(record))
    return name


@pytest.fixture
def gate(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The exit code, stdout and stderr of `harness check` with words, through the one door."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["check", *words])
        reported = capsys.readouterr()
        return code, reported.out, reported.err

    return run


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check_records(gate: Run) -> Run:
    """The same for a record held against the baseline of another, which it makes first: `b.json`."""

    def run(before: dict[str, Any], after: dict[str, Any], *words: str) -> tuple[int, str, str]:
        assert gate(put(before, "before"), "--baseline", "b.json", "--update")[0] == 0
        return gate(put(after, "after"), "--baseline", "b.json", *words)

    return run


def lines(text: str) -> list[str]:
    """The lines with their columns a blank apart."""
    return [" ".join(line.split()) for line in text.splitlines()]


# What holds


def test_a_run_holds_what_it_held(check_records: Run) -> None:
    assert check_records(record_of(), record_of()) == (
        0,
        "b   holds   ranks 0-1: 6.0 KiB at most, 5 phases\n",
        "",
    )


def test_a_rehearsed_role_and_the_ranks_it_stands_for_hold_the_same_baseline(check_records: Run) -> None:
    apart = record_of(rank_of([0]), rank_of([1]))
    assert check_records(record_of(rank_of([0, 1])), apart)[0] == 0
    assert check_records(apart, record_of(rank_of([0, 1])))[0] == 0


def test_ranks_that_one_side_did_not_measure_are_not_compared_and_that_is_said(check_records: Run) -> None:
    code, out, _ = check_records(
        record_of(rank_of([0]), size=4), record_of(rank_of([0]), rank_of([1, 2, 3], inputs=5))
    )
    assert code == 0
    assert out.endswith("ranks 1-3 not measured on both sides, and not compared\n")


def test_what_only_an_allocator_saw_is_compared_where_both_sides_heard_one(check_records: Run) -> None:
    def heard(kernel: int) -> dict[str, Any]:
        record = record_of(rank_of([0]))
        (rank,) = record["ranks"]
        rank["peak"]["categories"]["kernel"] = kernel
        rank["allocator"] = {"source": "cpu-events", "peak": 7 * KIB + kernel, "unattributed": 0}
        return record

    assert check_records(record_of(rank_of([0])), heard(5))[0] == 0
    assert check_records(heard(5), record_of(rank_of([0])))[0] == 0
    code, out, _ = check_records(heard(5), heard(6))
    assert code == 1
    assert "kernel, peak 6 B 5 B +1 B +20.00%" in lines(out)
    assert check_records(heard(5), heard(6), "--tolerance", "kernel=1", "--tolerance", "allocator=1")[0] == 0


def test_phases_after_the_exact_steps_are_left_out(check_records: Run) -> None:
    longer = record_of()
    none = {"peak": None, "end": 5, "categories": {"parameters": 7, "activations": None}}
    longer["ranks"][0]["phases"].append({"step": 2, "phase": "forward", "micro_batch": 0, **none})
    late = {"peak": 5, "end": 5, "categories": {"parameters": 5}}
    longer["ranks"][0]["phases"].append({"step": 3, "phase": "save", "micro_batch": 0, **late})
    assert check_records(record_of(), longer)[0] == 0


# What does not


def test_one_byte_more_fails_naming_the_category_the_ranks_the_phase_and_the_module(
    check_records: Run,
) -> None:
    grown = rank_of([0, 1])
    grown["categories"]["activations"]["peak"] += 1
    grown["phases"][3]["categories"]["activations"] += 1
    grown["peak"]["holdings"][1]["bytes"] += 1
    code, out, err = check_records(record_of(), record_of(grown))
    assert (code, err) == (1, "")
    reported = lines(out)
    assert reported[0] == "b NO ranks 0-1: activations +1 B (+0.02%), since step 1, forward (1 of 5 phases)"
    assert "activations, peak 4.0 KiB 4.0 KiB +1 B +0.02% step 1, forward (1 of 5 phases)" in reported
    assert (
        "ranks 0-1: at the peak the furthest from the baseline are layers.*.mlp: mm +1 B (+0.02%)" in reported
    )
    assert reported[-1] == announce.ACCEPT


def test_one_byte_less_fails_too(check_records: Run) -> None:
    code, out, _ = check_records(record_of(rank_of([0], inputs=8)), record_of(rank_of([0], inputs=7)))
    assert code == 1
    assert "inputs, peak 7 B 8 B -1 B -12.50% step 0, setup (5 of 5 phases)" in lines(out)


def test_what_is_left_at_the_end_is_compared(check_records: Run) -> None:
    leaking = rank_of([0])
    leaking["categories"]["kv_cache"]["end"] = 64
    code, out, _ = check_records(record_of(rank_of([0])), record_of(leaking))
    assert code == 1
    assert "kv_cache, end 64 B 0 B +64 B" in lines(out)


def test_a_category_that_only_a_phase_has_more_of_fails(check_records: Run) -> None:
    moved = rank_of([0])
    moved["phases"][2]["categories"]["workspace"] = 3
    code, out, _ = check_records(record_of(rank_of([0])), record_of(moved))
    assert code == 1
    assert "workspace, step 0, backward 3 B 0 B +3 B step 0, backward (1 of 5 phases)" in lines(out)


def test_a_category_whose_row_is_gone_is_still_held(gate: Run) -> None:
    tree = json.loads(broken())
    del tree["ranks"][0]["categories"]["activations"]
    Path("b.json").write_text(json.dumps(tree))
    code, out, _ = gate("run", "--baseline", "b.json")
    assert code == 1
    assert "activations, peak 4.0 KiB 0 B +4.0 KiB" in lines(out)
    for phase in tree["ranks"][0]["phases"]:
        phase["categories"]["slack"] = 5
    Path("b.json").write_text(json.dumps(tree))
    out = gate("run", "--baseline", "b.json")[1]
    assert "slack, step 0, setup 0 B 5 B -5 B -100.00% step 0, setup (5 of 5 phases)" in lines(out)


def test_modules_that_grew_are_named_though_less_is_left_at_the_end(check_records: Run) -> None:
    grown = rank_of([0], activations=8 * KIB)
    grown["categories"]["activations"]["end"] = 0
    out = check_records(record_of(rank_of([0])), record_of(grown))[1]
    assert any("layers.*.mlp: mm +4.0 KiB (+100.00%)" in line for line in lines(out))


def test_only_the_ranks_that_differ_are_named(check_records: Run) -> None:
    before = record_of(rank_of([0, 1, 2, 3, 4]))
    after = record_of(rank_of([0, 4]), rank_of([1, 2, 3], gradients=6))
    code, out, _ = check_records(before, after)
    assert code == 1
    assert out.splitlines()[0].partition("NO   ")[2].startswith("ranks 1-3: gradients +6 B")


def test_phases_that_one_side_lacks_fail(check_records: Run) -> None:
    shorter = record_of()
    del shorter["ranks"][0]["phases"][3:]
    code, out, _ = check_records(record_of(), shorter)
    assert code == 1
    assert "ranks 0-1: phases that the run has not: step 1, forward and 1 more" in lines(out)
    code, out, _ = check_records(shorter, record_of())
    assert code == 1
    assert "ranks 0-1: phases that the baseline has not: step 1, forward and 1 more" in lines(out)


def test_a_peak_that_is_elsewhere_is_said(check_records: Run) -> None:
    moved = rank_of([0])
    moved["phases"][2]["peak"] += 9
    moved["phases"][2]["categories"]["workspace"] = 9
    out = check_records(record_of(rank_of([0])), record_of(moved))[1]
    assert "rank 0: the peak is in step 0, backward, the baseline's in step 0, setup" in lines(out)


# What moves


def moving(nbytes: int, link: str = "network", step: int = 0) -> dict[str, Any]:
    """A record whose ranks gather so many bytes in forward."""
    row = {"step": step, "phase": "forward", "micro_batch": 0, "operation": "all-gather", "link": link}
    causes = [{"name": "layers.*.mlp.weight", "bytes": nbytes - 1}, {"name": "norm", "bytes": 1}]
    read = {**row, "phase": "setup", "operation": "read", "link": "storage", "calls": 1, "bytes": 7}
    record = record_of()
    record["ranks"][0]["traffic"] = [{**row, "calls": 2, "bytes": nbytes, "causes": causes}, read]
    return record


def test_one_byte_more_that_moves_fails_naming_ranks_phase_operation_link_and_cause(
    check_records: Run,
) -> None:
    code, out, err = check_records(moving(4096), moving(4097))
    assert (code, err) == (1, "")
    reported = lines(out)
    assert reported[0] == "b NO ranks 0-1: all-gather in forward over network +1 B (+0.02%)"
    assert "all-gather in forward over network, traffic 4.0 KiB 4.0 KiB +1 B +0.02%" in reported
    said = "all-gather in forward over network: 4,097 B, the baseline's 4,096 B, most for layers.*.mlp.weight"
    assert f"ranks 0-1: {said}" in reported
    assert check_records(moving(4096), moving(4097), "--tolerance", "traffic=1")[0] == 0


def test_another_link_is_another_figure(check_records: Run) -> None:
    code, out, _ = check_records(moving(4096, "nvlink"), moving(4096, "network"), "--json")
    assert code == 1
    changes = json.loads(out)["baselines"][0]["ranks"][0]["changes"]
    assert [(each["name"], each["before"], each["after"]) for each in changes] == [
        ("all-gather in forward over nvlink", 4096, 0),
        ("all-gather in forward over network", 0, 4096),
    ]


def test_what_moves_after_the_exact_steps_and_what_set_up_reads_is_not_held(check_records: Run) -> None:
    after = moving(4096)
    after["ranks"][0]["traffic"] += moving(5, step=3)["ranks"][0]["traffic"]
    assert check_records(moving(4096), after)[0] == 0


def test_a_baseline_has_no_causes_and_one_without_traffic_holds_and_says_so(
    check_records: Run, gate: Run
) -> None:
    code, out, _ = check_records(record_of(), moving(4096))
    assert code == 0
    assert out.endswith("; its traffic is not in the baseline; --update adds it\n")
    assert "traffic" not in Path("b.json").read_text()
    assert "rewritten" in gate("after", "--baseline", "b.json", "--update")[1]
    [row] = json.loads(Path("b.json").read_text())["ranks"][0]["traffic"]
    assert row == {"phase": "forward", "operation": "all-gather", "link": "network", "bytes": 4096}
    assert "unchanged" in gate("after", "--baseline", "b.json", "--update")[1]
    code, out, _ = gate("before", "--baseline", "b.json")
    assert code == 0
    assert out.endswith("; the run has no traffic counted, and the baseline's is not compared\n")


def test_traffic_that_is_known_in_part_is_not_compared(check_records: Run) -> None:
    after = moving(4097)
    after["ranks"][0]["unseen"] = [
        "all-gather is not in the figures of traffic: the ledger could not read it"
    ]
    assert check_records(moving(4096), after)[0] == 0


# Why it does not


def another(record: dict[str, Any], **config: Any) -> dict[str, Any]:
    """`record` with the config of its own words, and with these keys of `train` besides."""
    from omegaconf import OmegaConf

    from harness.config.compose import compose

    tree: Any = OmegaConf.to_container(compose(WORDS), resolve=True)
    del tree["hydra"]
    tree["train"].update(config)
    return {**record, "config": tree}


def test_keys_of_the_config_that_differ_are_named_and_its_world_s_are_not(check_records: Run) -> None:
    grown = another(record_of(rank_of([0], inputs=1)), micro_batch=8)
    grown["config"]["world"]["kind"] = "rehearsed"
    out = check_records(record_of(rank_of([0])), grown)[1]
    assert "another config: train.micro_batch=8, the baseline's 4" in lines(out)


def test_what_a_baseline_leaves_to_auto_is_no_other_config(check_records: Run) -> None:
    grown = another(record_of(rank_of([0], inputs=1)), micro_batch=8)
    grown["config"]["precision"] = "bf16"
    grown["config"]["model"]["attention"] = "sdpa"
    out = check_records(record_of(rank_of([0])), grown)[1]
    assert "another config: train.micro_batch=8, the baseline's 4" in lines(out)


def test_a_dependency_whose_version_moved_is_named(check_records: Run) -> None:
    grown = another(record_of(rank_of([0], inputs=1)))
    grown["environment"]["packages"]["torch"] = "2.14.1"
    out = check_records(record_of(rank_of([0])), grown)[1]
    assert "the same config; torch 2.14.1, the baseline's 2.13.0" in lines(out)


def test_where_nothing_else_moved_the_code_did(check_records: Run) -> None:
    out = check_records(record_of(rank_of([0])), another(record_of(rank_of([0], inputs=1))))[1]
    assert "neither the config nor a version changed: the code did" in lines(out)


def test_another_number_of_parameters_is_said(check_records: Run) -> None:
    grown = record_of(rank_of([0], parameters=5 * KIB))
    grown["model"]["parameters"] += 3
    out = check_records(record_of(rank_of([0])), grown)[1]
    assert "model parameters: 3098883, the baseline's 3098880" in lines(out)


# Tolerances


@pytest.mark.parametrize(
    ("amount", "code"), [("1%", 0), ("0.9%", 1), ("10", 0), ("9B", 1), ("1KiB", 0), ("0", 1)]
)
def test_a_tolerance_is_a_share_of_the_baseline_or_bytes(check_records: Run, amount: str, code: int) -> None:
    before, after = rank_of([0], inputs=1000), rank_of([0], inputs=1010)
    assert check_records(record_of(before), record_of(after), "--tolerance", f"inputs={amount}")[0] == code


def test_a_tolerance_is_for_its_own_category(check_records: Run) -> None:
    grown = record_of(rank_of([0], inputs=1, workspace=1))
    code, out, _ = check_records(
        record_of(rank_of([0])), grown, "--tolerance", "inputs=1%", "--tolerance", "workspace=1"
    )
    assert code == 1
    assert "inputs" in out
    assert "workspace" not in out


def test_a_tolerance_in_the_file_counts_is_kept_by_an_update_and_yields_to_the_command_line(
    gate: Run,
) -> None:
    before, after = (put(record_of(rank_of([0], inputs=n)), f"r{n}") for n in (1000, 1010))
    assert gate(before, "--baseline", "b.json", "--update", "--tolerance", "inputs=1%")[0] == 0
    assert json.loads(Path("b.json").read_text())["tolerance"] == {"inputs": "1%"}
    assert gate(after, "--baseline", "b.json")[0] == 0
    assert gate(after, "--baseline", "b.json", "--tolerance", "inputs=0")[0] == 1
    assert gate(after, "--baseline", "b.json", "--update")[0] == 0
    assert json.loads(Path("b.json").read_text())["tolerance"] == {"inputs": "1%"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("activatons=1%", "--tolerance activatons=1%: no such category; one of parameters, "),
        ("inputs=lots", "--tolerance inputs=lots: should be a share as 1%, or a size as 64KiB, 0 or more"),
        ("inputs=-1%", "--tolerance inputs=-1%: should be a share"),
        ("inputs=nan%", "--tolerance inputs=nan%: should be a share"),
        ("inputs=inf%", "--tolerance inputs=inf%: should be a share"),
        ("inputs", "--tolerance inputs: give a category and how much it may differ"),
    ],
)
def test_a_tolerance_that_cannot_be_read_is_refused(check_records: Run, text: str, said: str) -> None:
    code, out, err = check_records(record_of(), record_of(), "--tolerance", text)
    assert (code, out) == (2, "")
    assert err.startswith(f"harness: {said}")
    assert err.count("\n") == 1


# The file


def test_the_file_has_a_figure_s_row_on_a_line_and_the_words_without_world_and_directory(gate: Run) -> None:
    record = record_of()
    record["environment"]["command"] += ["world=rehearsed", "world.size=2", "+hydra.x=1"]
    gate(put(record), "--baseline", "profiles/b.json", "--update")
    text = Path("profiles/b.json").read_text()
    assert '    "activations": [4096, 2048],\n' in text
    assert '    {"category": "activations", "name": "layers.*.mlp: mm", "bytes": 4096}\n' in text
    row = {"step": 1, "phase": "forward", "micro_batch": 1, "peak": 6144}
    measured = {"parameters": 2048, "activations": 4096}
    assert f"    {json.dumps({**row, 'categories': measured})}\n" in text
    tree = json.loads(text)
    assert tree["schema"] == "harness.baseline/1"
    assert tree["config"] == WORDS
    assert [each["ranks"] for each in tree["ranks"]] == ["0-1"]
    assert baseline.text(baseline.read(Path("profiles/b.json"))) == text


def test_an_update_says_what_it_did_and_leaves_what_is_the_same_alone(gate: Run) -> None:
    run = put(record_of())
    assert gate(run, "--baseline", "b.json", "--update")[1].split()[:2] == ["b", "made"]
    before = Path("b.json").stat().st_mtime_ns
    assert gate(run, "--baseline", "b.json", "--update")[1].split()[:2] == ["b", "unchanged"]
    assert Path("b.json").stat().st_mtime_ns == before
    other = put(record_of(rank_of([0, 1], inputs=3)), "other")
    assert gate(other, "--baseline", "b.json", "--update")[1].split()[:2] == ["b", "rewritten"]
    assert gate(other, "--baseline", "b.json")[0] == 0
    assert sorted(each.name for each in Path().iterdir()) == ["b.json", "other", "run"]


@pytest.mark.parametrize(
    ("numbers", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([6, 0, 1, 3, 4], "0-1,3-4,6"), ([10, 9], "9-10")]
)
def test_ranks_are_told_as_ranges_and_read_back(numbers: list[int], text: str) -> None:
    assert baseline.rank_ranges(numbers) == text
    assert baseline.numbers_in(text) == sorted(numbers)


PHASE = {"step": 0, "phase": "forward", "micro_batch": 0, "peak": 0, "categories": {}}
RANKS = {"ranks": "0", "categories": {}, "phases": [PHASE]}


@pytest.mark.parametrize("text", ["", "0-", "-1", "a", "3-1", "0,,1", "0-99999999"])
def test_what_is_no_range_of_ranks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="should be ranks, as 0-3,6"):
        baseline.numbers_in(text)


def broken(**changes: Any) -> str:
    """A baseline's file with these in it."""
    put(record_of())
    assert main(["check", "run", "--baseline", "b.json", "--update"]) == 0
    return json.dumps({**json.loads(Path("b.json").read_text()), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lambda: broken()[:200], "b.json cannot be read: "),
        (lambda: "\udcff", "b.json cannot be read: "),
        (lambda: "[" * 100_000, "b.json cannot be read: "),
        (lambda: "[]", "b.json has schema None, and this version reads 'harness.baseline/1'"),
        (
            lambda: broken(schema="harness.baseline/2"),
            "b.json has schema 'harness.baseline/2', and this version ",
        ),
        (
            lambda: broken(world=0),
            "b.json is not a complete baseline: world=0: should be greater than or equal to 1",
        ),
        (
            lambda: broken(toleranse={}),
            "b.json is not a complete baseline: toleranse={}: Extra inputs are not permitted",
        ),
        (lambda: broken(tolerance={"input": "1%"}), "b.json: tolerance.input=1%: no such category; one of "),
        (
            lambda: broken(ranks=[{"ranks": "a-b"}]),
            "b.json is not a complete baseline: ranks.0.categories is missing",
        ),
        (
            lambda: broken(ranks=[]),
            "b.json is not a complete baseline: ranks=[]: List should have at least 1 item",
        ),
        (lambda: broken(ranks=[RANKS, RANKS]), "b.json is not a complete baseline: ranks="),
        (
            lambda: broken(ranks=[{**RANKS, "ranks": "0-"}]),
            "b.json is not a complete baseline: ranks.0.ranks='0-'",
        ),
        (
            lambda: broken(ranks=[{**RANKS, "phases": 5}]),
            "b.json is not a complete baseline: ranks.0.phases=5",
        ),
    ],
)
def test_a_baseline_that_cannot_be_read_is_refused_and_never_written_over(
    gate: Run, capsys: pytest.CaptureFixture[str], text: Callable[[], str], said: str
) -> None:
    wrong = text().encode("utf-8", "surrogateescape")
    capsys.readouterr()
    Path("b.json").write_bytes(wrong)
    code, out, err = gate(put(record_of()), "--baseline", "b.json")
    assert (code, out) == (2, "")
    assert err.startswith(f"harness: {said}")
    assert err.count("\n") == 1
    assert gate("run", "--baseline", "b.json", "--update")[0] == 2
    assert Path("b.json").read_bytes() == wrong


# What does not compare


def changed(record: dict[str, Any], part: str, **values: Any) -> dict[str, Any]:
    record[part] = {**record[part], **values}
    return record


def failed(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "status": "failed", "failure": {"rank": 1, "error": "out of memory"}}


def inexact(record: dict[str, Any]) -> dict[str, Any]:
    for phase in record["ranks"][0]["phases"]:
        phase["peak"] = None
    return record


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            {**record_of(), "mode": "infer"},
            "mode=infer: b.json is a baseline of mode=train; name another, or ",
        ),
        (
            changed(record_of(), "model", name="gpt2"),
            "model.name=gpt2: b.json is a baseline of model.name=tiny; ",
        ),
        (changed(record_of(), "world", device="cuda"), "device=cuda: b.json is a baseline of device=cpu; "),
        (record_of(rank_of([0])), "world.size=1: b.json is a baseline of world.size=2; "),
        (record_of(rank_of([2]), size=2), "b.json: it has figures of ranks 0-1, the run of 2 only"),
        (failed(record_of()), "after: the run failed (out of memory); only a complete run counts"),
        (inexact(record_of()), "after: nothing of rank 0 was measured exactly; ledger=exact measures it"),
        ({**record_of(), "ranks": []}, "after: it has the accounting of no rank"),
        (
            {**record_of(), "schema": "harness.record/9"},
            "after/record.json has schema 'harness.record/9', and ",
        ),
        ({**record_of(), "ranks": 5}, "after is not a complete record: ranks=5: "),
    ],
)
def test_what_does_not_compare_is_refused_with_a_sentence(
    check_records: Run, run: dict[str, Any], said: str
) -> None:
    code, out, err = check_records(record_of(), run)
    assert (code, out) == (2, "")
    assert err.startswith(f"harness: {said}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "check: give either --baseline FILE or --all"),
        (("--all", "--baseline", "b.json"), "check: give either --baseline FILE or --all"),
        (("run", "--all"), "check run: --all rehearses and takes no run; compare a run with --baseline FILE"),
        (("--all",), "--profiles profiles: it has no baseline; RUN --baseline FILE --update makes one"),
        (("--baseline", "none.json"), "none.json: there is no baseline; --update makes one from a run"),
        (
            ("--baseline", "none.json", "--update"),
            "none.json: there is no baseline; --update makes one from a run",
        ),
        (("norun", "--baseline", "b.json"), "norun contains no record.json"),
        (("--baselines", "b.json"), "check: unrecognized arguments: --baselines"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(gate: Run, words: tuple[str, ...], said: str) -> None:
    code, out, err = gate(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"harness: {said}")
    assert err.count("\n") == 1


def test_a_place_that_cannot_be_written_is_said(check_records: Run, gate: Run) -> None:
    Path("file").write_text("")
    code, _, err = gate(put(record_of()), "--baseline", "file/b.json", "--update")
    assert (code, err.partition(": ")[2][:11]) == (2, "file/b.json")
    code, _, err = check_records(record_of(), record_of(), "--junit", "file/j.xml")
    assert (code, err.partition("written: ")[0]) == (2, "harness: --junit file/j.xml: it cannot be ")


def test_a_record_s_odd_names_reach_no_terminal_as_they_are(check_records: Run) -> None:
    odd = rank_of([0], inputs=1)
    odd["categories"]["\x1b[31mred"] = {"peak": 5, "end": 5}
    code, out, _ = check_records(record_of(rank_of([0])), record_of(odd))
    assert code == 1
    assert "\x1b" not in out
    assert "?[31mred, peak" in out


def test_judging_records_imports_no_torch(check_records: Run) -> None:
    assert check_records(record_of(), record_of())[0] == 0
    (Path("torch.py")).write_text("raise SystemExit('torch was imported')")
    result = subprocess.run(
        [sys.executable, "-m", "harness", "check", "after", "--baseline", "b.json"],
        env={**os.environ, "PYTHONPATH": f".:{ROOT}"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


# Other forms


LOST = "lost.json: there is no baseline; --update makes one from a run"


def several() -> list[Any]:
    """A verdict of each kind: one that holds, one that does not, one that could not be checked."""
    put(record_of(rank_of([0])), "before")
    put(record_of(rank_of([0], inputs=1)), "after")
    given: dict[str, str] = {}
    before, after = (parse(record_file.read(Path(name)), name) for name in ("before", "after"))
    check._settled(Path("same.json"), before, "before", True, given)
    check._settled(Path("other,a:b%.json"), before, "before", True, given)
    return [
        check._settled(Path("same.json"), before, "before", False, given),
        check._settled(Path("other,a:b%.json"), after, "after", False, given),
        check._settled(Path("lost.json"), before, "before", False, given),
    ]


def test_json_has_every_change_in_bytes(check_records: Run) -> None:
    code, out, _ = check_records(record_of(), record_of(rank_of([0, 1], inputs=6)), "--json")
    (reported,) = json.loads(out)["baselines"]
    assert (code, reported["verdict"], reported["baseline"]) == (1, "does not hold", "b.json")
    (ranks,) = reported["ranks"]
    assert ranks["ranks"] == "0-1"
    changes = {(each["name"], each["figure"]): (each["before"], each["after"]) for each in ranks["changes"]}
    assert changes == {("inputs", "peak"): (0, 6), ("inputs", "end"): (0, 3)}


def test_junit_has_a_case_for_each_with_its_failure_or_error() -> None:
    suites = ElementTree.fromstring(announce.junit(several()))
    (suite,) = suites
    assert {key: suite.get(key) for key in ("tests", "failures", "errors")} == {
        "tests": "3",
        "failures": "1",
        "errors": "1",
    }
    measured, other, lost = suite
    assert (measured.get("name"), [*measured]) == ("same", [])
    (failure,), (error,) = other, lost
    assert failure.tag == "failure"
    assert failure.get("message", "").startswith("rank 0: inputs +1 B")
    assert "inputs, peak" in (failure.text or "")
    assert (error.tag, error.get("message")) == (
        "error",
        "lost.json: there is no baseline; --update makes one from a run",
    )


def test_junit_is_written_by_the_tool(check_records: Run) -> None:
    assert check_records(record_of(), record_of(rank_of([0, 1], inputs=6)), "--junit", "out/j.xml")[0] == 1
    (suite,) = ElementTree.parse("out/j.xml").getroot()
    assert (suite.get("failures"), [case.get("name") for case in suite]) == ("1", ["b"])


def test_github_is_told_of_each_that_does_not_hold_with_what_its_commands_would_obey_escaped() -> None:
    other, lost = announce.annotations(several())
    assert other.startswith("::error file=other%2Ca%3Ab%25.json,title=other%2Ca%3Ab%25::rank 0: inputs +1 B")
    assert "%0A" in other
    assert "\n" not in other
    assert (
        lost
        == "::error file=lost.json,title=lost::lost.json: there is no baseline; --update makes one from a run"
    )


@pytest.mark.parametrize(
    ("text", "within", "escaped"),
    [
        ("100%\r\nof: it, all", False, "100%25%0D%0Aof: it, all"),
        ("100%\r\nof: it, all", True, "100%25%0D%0Aof%3A it%2C all"),
        ("%0A", False, "%250A"),
    ],
)
def test_github_s_escapes_are_its_own(text: str, within: bool, escaped: str) -> None:
    assert announce._escaped(text, within) == escaped


def test_where_all_hold_github_gets_one_notice() -> None:
    (notice,) = announce.annotations(several()[:1])
    assert notice == "::notice title=harness check::1 baselines: 1 hold"


def test_on_github_the_tool_prints_annotations_and_appends_to_the_summary(
    check_records: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("before\n")
    _, out, _ = check_records(record_of(), record_of(rank_of([0, 1], inputs=6)))
    assert out.splitlines()[-1].startswith("::error file=b.json,title=b::ranks 0-1: inputs +6 B")
    page = Path("summary.md").read_text()
    assert page.startswith("before\n### Memory: 1 baselines: 1 made\n")
    assert "| b | NO | ranks 0-1: inputs +6 B" in page
    assert "| inputs, peak | 6 B | 0 B | +6 B |  | step 0, setup (5 of 5 phases) |" in page
    _, out, err = check_records(record_of(), record_of(rank_of([0, 1], inputs=6)), "--json")
    json.loads(out)
    assert err.startswith("::error ")


def test_a_summary_that_cannot_be_written_is_said(
    check_records: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_records(record_of(), record_of())[0] == 0
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "nowhere/summary.md")
    assert main(["check", "after", "--baseline", "b.json"]) == 2


# Rehearsals


def test_a_baseline_is_rehearsed_from_the_config_inside_it(gate: Run) -> None:
    assert main([*QUICK, "world=rehearsed", "world.size=1", "hydra.run.dir=made"]) == 0
    assert gate("made", "--baseline", "profiles/quick.json", "--update")[0] == 0
    tree = json.loads(Path("profiles/quick.json").read_text())
    chosen = json.loads(Path("made/record.json").read_text())["config"]["precision"]
    assert tree["config"] == [*QUICK, f"precision={chosen}"]  # another machine's choice may be another
    code, out, err = gate("--baseline", "profiles/quick.json")
    assert (code, out.split()[:2]) == (0, ["quick", "holds"]), err
    tree["config"].append("generation.max_new_tokens=3")
    Path("profiles/quick.json").write_text(json.dumps(tree))
    code, out, _ = gate("--baseline", "profiles/quick.json")
    assert (code, "activations" in out or "kv_cache" in out) == (1, True)

    for name, config in (("bad", ["zero=7"]), ("worse", ["mode=infer", "pipeline.stages=3"])):
        Path(f"profiles/{name}.json").write_text(json.dumps({**tree, "config": config}))
    code, out, err = gate("--all", "--junit", "j.xml")
    assert code == 2
    assert lines(out)[-1] == "3 baselines: 2 not checked, 1 do not hold"
    assert "harness: profiles/bad.json: zero=7: no such option; one of 0, 1, 2, 3\n" in err
    assert "harness: profiles/worse.json: pipeline.stages=3: 1 rank here" in err
    (suite,) = ElementTree.parse("j.xml").getroot()
    assert [case.get("name") for case in suite] == ["bad", "quick", "worse"]

    for name in ("bad", "worse"):
        Path(f"profiles/{name}.json").unlink()
    Path("profiles/again.json").write_text(Path("profiles/quick.json").read_text())
    assert gate("--all", "--update")[0] == 0
    code, out, _ = gate("--all")
    assert (code, lines(out)[-1]) == (0, "2 baselines: 2 hold")


def test_a_test_s_baseline_is_pytest_s(gate: Run) -> None:
    Path("b.json").write_text(text := broken(mode="test", config=[]))
    code, out, err = gate("--baseline", "b.json", "--update")
    assert (code, out) == (2, "b   made   b.json\n")
    assert err.startswith("harness: b.json: it belongs to a test; pytest checks it")
    assert Path("b.json").read_text() == text


def test_a_baseline_whose_config_is_none_any_more_is_named(gate: Run) -> None:
    Path("b.json").write_text(broken(config=["train.stepps=3"]))
    code, _, err = gate(put(another(record_of(rank_of([0, 1], inputs=1)))), "--baseline", "b.json")
    assert code == 2
    assert err == "harness: b.json: config: train.stepps=3: no such key; did you mean train.steps?\n"


def test_a_rehearsal_that_fails_is_said_and_not_hidden(gate: Run) -> None:
    broken(config=["mode=infer", "model=tiny", "generation.prompts=prompts.txt"])
    tree = json.loads(broken(config=["mode=train", "model=tiny", "model.config.model_type=nothing"]))
    Path("b.json").write_text(json.dumps(tree))
    code, _, err = gate("--baseline", "b.json")
    assert code == 2
    assert err.startswith("harness: b.json: ")
    assert err.count("\n") == 1


def test_a_rehearsal_that_fails_by_itself_is_no_wrong_request_and_its_traceback_is_in_a_file(
    gate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(point: str, number: int) -> None:
        raise KeyError(f"out of luck at {point}")

    Path("b.json").write_text(broken(mode="infer", world=1, config=[*QUICK, "precision=fp32"]))
    monkeypatch.setattr(faults, "inject", fail)
    code, _, err = gate("--baseline", "b.json")
    assert code == 3
    said = re.fullmatch(
        r"harness: b.json: its rehearsal failed: KeyError: 'out of luck at prefill' \(traceback in (.+)\)\n",
        err,
    )
    assert said is not None, err
    assert "KeyError: 'out of luck at prefill'" in Path(said[1]).read_text().splitlines()[-1]
    Path(said[1]).unlink()


def test_the_committed_baselines_are_as_the_tool_writes_them() -> None:
    files = sorted((ROOT / "profiles").glob("*.json"))
    assert len(files) >= 15
    for file in files:
        assert baseline.text(baseline.read(file)) == file.read_text()


def test_every_name_that_a_failure_may_say_can_be_tolerated() -> None:
    assert set(tolerances(dict.fromkeys(CATEGORIES, "0"), "")) == set(CATEGORIES)
