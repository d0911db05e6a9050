"""What is said of a run: each surprise where the figures show it and nowhere else, and savings that are true."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from harness.advice import explain
from harness.advice.savings import Rehearsed, candidates, ranked, settings_of
from harness.analysis.findings.finding import Finding
from harness.config import compose
from harness.config.load import load
from harness.model.plan import Plan
from harness.record import record_file
from harness.record.schema import Record, parse
from harness.rehearsal import all_ranks, pool
from harness.rehearsal.one_rank import rehearse
from harness.rehearsal.representatives import representatives_of
from harness.runtime import faults
from harness.tables import size

QUICK = "train.steps=2 train.sequence=64"
DECIDED = ("precision=bf16", "model.attention=sdpa")
"""What their `auto` came to, as on a CPU with units for it."""
TRAIN = f"mode=train world.size=2 {QUICK} model.config.num_hidden_layers=2"
INFER = "mode=infer world.size=2 generation.max_new_tokens=4 model.config.num_hidden_layers=2"
SHALLOW = "model.config.num_hidden_layers=1"
LOGITS = f"{TRAIN} zero=2 model.config.vocab_size=8000 train.sequence=256"
LARGE = f"{TRAIN} zero=2 train.micro_batch=16"
GATHERED = f"{TRAIN} zero=3 train.steps=3"  # validation is the last that an exact ledger sees
WINDOW = f"{INFER} model.config.model_type=mistral +model.config.sliding_window=16"
STATES = (
    f"{INFER} model.config.num_hidden_layers=4 model.config.model_type=qwen3_next +model.config.num_experts=2 "
    "+model.config.num_experts_per_tok=1 +model.config.moe_intermediate_size=32 "
    "+model.config.shared_expert_intermediate_size=32"
)
UNEVEN = f"{INFER} generation.prompt=['a','{'long' * 25}','b','c']"


@cache
def rehearsed(words: str) -> str:
    """The record of a rehearsal, as JSON: what a run of `words` leaves."""
    overrides = [*DECIDED, *words.split(), "world=rehearsed"]
    return record_file.text(all_ranks.rehearsed(load(compose.compose(overrides)), overrides, parallel=False))


def record_of(words: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(rehearsed(words))
    return record


def findings_by_kind(record: dict[str, Any]) -> dict[str, Finding]:
    """What the record alone shows, by kind."""
    return {finding.kind: finding for finding in explain.explain(parse(record, "it"))}


def put(directory: Path, record: dict[str, Any]) -> Path:
    (directory / "record.json").write_text(json.dumps(record))
    return directory


def peak_of(words: str) -> int:
    plan = Plan.of(load(compose.compose([*DECIDED, *words.split(), "world=rehearsed"])))
    return max(
        rehearse(plan, representative.rank)[0].peak.bytes or 0 for representative in representatives_of(plan)
    )


# What the peak is


def test_the_peak_is_said_with_its_parts_and_its_place() -> None:
    record = record_of(f"{TRAIN} zero=2")
    peak = record["ranks"][0]["peak"]
    finding = findings_by_kind(record)["peak"]
    assert finding.bytes == peak["bytes"]
    name, measured = max(peak["categories"].items(), key=lambda pair: pair[1] or 0)
    assert finding.sentence.startswith(f"Each of the 2 ranks holds {size(peak['bytes'])} at its peak: ")
    assert f"{size(measured)} {name} ({measured / peak['bytes']:.0%})" in finding.sentence
    assert (
        f"in step {peak['where']['step']}, {peak['where']['phase']}, in {peak['where']['module']}."
        in finding.sentence
    )


def test_the_largest_holdings_are_named_those_of_all_layers_as_one() -> None:
    record = record_of(f"{TRAIN} zero=2")
    named = [h for h in record["ranks"][0]["peak"]["holdings"] if h["name"].endswith("mlp.act_fn: silu")]
    assert len(named) == 2  # layers
    record["ranks"][0]["peak"]["holdings"] = named
    finding = findings_by_kind(record)["holdings"]
    total = sum(holding["bytes"] for holding in named)
    assert finding == ("holdings", f"Largest by name: model.layers.*.mlp.act_fn: silu {size(total)}.", total)


def test_a_run_without_a_peak_says_what_measures_one() -> None:
    record = record_of(f"{TRAIN} zero=2")
    for rank in record["ranks"]:
        rank["peak"] = {"bytes": None, "where": None, "categories": {}}
    assert "ledger=exact" in findings_by_kind(record)["peak"].sentence
    assert findings_by_kind(record)["peak"].bytes is None


def test_the_worst_rank_is_named_with_the_reason() -> None:
    record = record_of(UNEVEN)
    low, high = (rank["peak"]["bytes"] for rank in record["ranks"])
    findings = findings_by_kind(record)
    assert findings["peak"].sentence.startswith("Rank 1 of 2, the highest, holds")
    assert findings["worst_rank"].bytes == high - low
    assert findings["worst_rank"].sentence.endswith(": its batches are 2 x 100 tokens.")
    for rank in record["ranks"]:
        del rank["why"]  # as in the record of a run
    assert "its prompts are longer" in findings_by_kind(record)["worst_rank"].sentence


def test_a_reason_that_the_record_gives_is_told() -> None:
    record = record_of(f"{TRAIN} zero=2")
    for rank in record["ranks"]:
        rank["why"] = "it has the embedding"
    assert "worst_rank" not in findings_by_kind(record)  # both hold as much
    record["ranks"] = [{**record["ranks"][0], "stands_for": [0], "bounds": [1]}]
    assert findings_by_kind(record)["worst_rank"] == (
        "worst_rank",
        "Rank 0 is the worst: it has the embedding.",
        None,
    )


def test_ranks_that_are_alike_are_not_compared() -> None:
    assert "worst_rank" not in findings_by_kind(record_of(f"{TRAIN} zero=2"))


# Surprises, each with a run that has it and a run that has not

SHOWN = {
    "bucket": (f"{TRAIN} zero=3", f"{TRAIN} zero=3 zero.reduce_bucket_size=100000"),
    "first_step": (f"{TRAIN} zero=0", INFER),
    "logits": (LOGITS, f"{TRAIN} zero=2"),
    "checkpointing": (f"{LOGITS} checkpointing=full", f"{LARGE} checkpointing=selective"),
    "gathered": (GATHERED, f"{GATHERED} train.validate_every=0"),
    "offload": (f"{TRAIN} zero=2 zero.offload=optimizer", f"{TRAIN} zero=2"),
    "waiting": (f"{TRAIN} zero=2 checkpointing.offload=cpu", f"{TRAIN} zero=2"),
    "ranks": (f"{TRAIN} zero=2", f"{TRAIN} zero=2 world.size=1"),
    "kv_cache": (f"{INFER} generation.prompt_length=512 generation.count=16 generation.batch=8", INFER),
    "padding": (UNEVEN, INFER),
    "cache_copies": (INFER, f"{INFER} generation.cache=static"),
    "pinned": (f"{WINDOW} generation.max_new_tokens=1", WINDOW),
    "state": (STATES, INFER),
    "on_host": (f"{INFER} hardware=h100-sxm generation.cache=offloaded", f"{INFER} hardware=h100-sxm"),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_a_surprise_is_said_where_it_is(kind: str) -> None:
    assert kind in findings_by_kind(record_of(SHOWN[kind][0]))


@pytest.mark.parametrize("kind", SHOWN)
def test_a_surprise_is_not_said_where_it_is_not(kind: str) -> None:
    assert kind not in findings_by_kind(record_of(SHOWN[kind][1]))


def phases(record: dict[str, Any], step: int, name: str) -> dict[str, Any]:
    return next(p for p in record["ranks"][0]["phases"] if (p["step"], p["phase"]) == (step, name))


def test_the_figures_of_training_are_the_records() -> None:
    record = record_of(GATHERED)
    findings, rank = findings_by_kind(record), record["ranks"][0]
    assert findings["bucket"].bytes == 2 * 5_000_000
    assert "ZeRO-3 keeps it" in findings["bucket"].sentence
    assert findings["gathered"].bytes == rank["categories"]["gathered"]["end"]
    had, has = (phases(record, step, "forward")["categories"]["optimizer"] for step in (0, 1))
    assert findings["first_step"].bytes == has - had
    shared = sum(rank["peak"]["categories"][name] for name in ("optimizer", "gradients", "parameters"))
    assert findings["ranks"].bytes == rank["peak"]["bytes"] - shared


def test_the_logits_are_sequences_by_tokens_by_words() -> None:
    finding = findings_by_kind(record_of(LOGITS))["logits"]
    assert finding.bytes == 3 * 4 * 4 * 256 * 8000
    assert "4 sequences x 256 tokens x 8,000 words" in finding.sentence


def test_the_figures_of_a_cache_are_the_records() -> None:
    record = record_of(UNEVEN)
    kv = record["inference"]
    assert findings_by_kind(record)["padding"].bytes == kv["kv_reserved"] - kv["kv_live"]
    record = record_of(INFER)
    highest = record["ranks"][0]["categories"]["kv_cache"]["peak"]
    assert findings_by_kind(record)["cache_copies"].bytes == highest - record["inference"]["kv_reserved"]
    record = record_of(f"{INFER} generation.cache=quantized")
    highest = record["ranks"][0]["categories"]["kv_cache"]["peak"]
    copies = findings_by_kind(record)["cache_copies"]
    assert copies.bytes == highest - record["inference"]["kv_reserved"]
    assert copies.sentence.startswith("The quantized cache copies a layer")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            f"{TRAIN} zero=2 checkpointing=full model.config.num_hidden_layers=4",
            "does not reach this peak: in step no layer keeps activations",
        ),
        (
            f"{TRAIN} zero=0 checkpointing=full model.config.num_hidden_layers=4",
            "does not reach this peak: in step no layer keeps activations",
        ),
        (f"{LOGITS} checkpointing=full", "of activations are made outside the layers, as logits are"),
        (f"{LARGE} checkpointing=full checkpointing.layers=[1]", "is for 1 of 2 layers; the others keep"),
        (
            f"{LARGE} checkpointing=full checkpointing.every=2 model.config.num_hidden_layers=4",
            "is for 2 of 4 layers; the others keep",
        ),
        (f"{LARGE} checkpointing=full model.config.num_hidden_layers=1", "recomputes one layer: "),
    ],
)
def test_the_reason_why_checkpointing_has_little_hold_on_a_peak_is_in_its_figures(
    words: str, said: str
) -> None:
    record = record_of(words)
    finding = findings_by_kind(record)["checkpointing"]
    assert said in finding.sentence
    assert finding.bytes == record["ranks"][0]["peak"]["categories"]["activations"]


def test_activations_that_are_a_small_part_of_the_peak_leave_little_to_save() -> None:
    record = record_of(f"{LARGE} checkpointing=full")
    assert "checkpointing" not in findings_by_kind(record)
    for rank in record["ranks"]:
        rank["peak"]["bytes"] *= 11
    assert "has little left to save: activations are " in findings_by_kind(record)["checkpointing"].sentence


def test_room_that_no_token_came_to_is_said() -> None:
    record = record_of(f"{INFER} generation.cache=static")
    record["inference"] |= {"kv_reserved": 4096, "kv_filled": 1024, "kv_live": 1024}
    assert findings_by_kind(record)["padding"].bytes == 3072
    assert "3.0 KiB were never filled" in findings_by_kind(record)["padding"].sentence


def test_optimizer_state_that_is_on_the_host_moved() -> None:
    assert "offload" not in findings_by_kind(
        record_of(f"{TRAIN} zero=2 zero.offload=optimizer hardware=a100-80gb")
    )


def test_a_record_of_one_step_says_what_the_next_one_begins_with() -> None:
    record = record_of(f"{TRAIN} zero=2 train.steps=1")
    both = record_of(f"{TRAIN} zero=2")
    finding = findings_by_kind(record)["first_step"]
    assert finding.bytes == findings_by_kind(both)["first_step"].bytes
    assert "the next step would begin" in finding.sentence


def test_a_run_that_failed_before_its_optimizer_says_what_is_still_to_come() -> None:
    record = record_of(f"{TRAIN} zero=2")
    rank = record["ranks"][0]
    rank["phases"] = [p for p in rank["phases"] if p["step"] == 0 and p["phase"] in ("setup", "forward")]
    rank["categories"]["optimizer"]["end"] = phases(record, 0, "forward")["categories"]["optimizer"]
    record |= {"ranks": [rank], "status": "failed"}
    finding = findings_by_kind(record)["first_step"]
    assert finding.bytes == 8 * record["model"]["parameters"] // 2
    assert "not there yet" in finding.sentence


@pytest.mark.parametrize("phase", ["setup", "checkpoint"])
def test_a_peak_outside_the_steps_is_said(phase: str) -> None:
    record = record_of(f"{TRAIN} zero=2")
    assert "outside" not in findings_by_kind(record)
    for rank in record["ranks"]:
        highest = rank["peak"]["bytes"]
        rank["peak"]["bytes"] += 4096
        rank["peak"]["where"]["phase"] = phase
    finding = findings_by_kind(record)["outside"]
    assert finding.bytes == 4096
    assert f"in {phase}; no step goes above {size(highest)}" in finding.sentence


def test_bytes_that_nobody_can_name_come_first() -> None:
    record = record_of(f"{TRAIN} zero=2")
    for unattributed in (0, -4):
        record["ranks"][-1]["allocator"]["unattributed"] = unattributed
        assert "unattributed" not in findings_by_kind(record)
    record["ranks"][-1]["allocator"]["unattributed"] = 4096
    first = next(iter(explain.explain(parse(record, "it"))))
    assert first.kind == "unattributed"
    assert first.bytes == 4096
    assert first.sentence.startswith("CAUTION: on rank 1 ")


def test_a_failed_run_says_where_and_what_is_known_of_it() -> None:
    record = record_of(f"{TRAIN} zero=2")
    where = {"step": 1, "phase": "backward", "micro_batch": 0}
    record |= {"status": "failed", "failure": {"rank": 1, "where": where, "error": "RuntimeError: no memory"}}
    record["ranks"] = record["ranks"][:1]
    sentences = [each.sentence for each in explain.explain(parse(record, "it")) if each.kind == "failure"]
    assert sentences[0] == "Rank 1 failed in step 1, backward: RuntimeError: no memory"
    assert "1 of 2 ranks" in sentences[1]
    record["ranks"] = []
    assert "no rank has saved its accounting" in findings_by_kind(record)["failure"].sentence
    assert "failure" not in findings_by_kind(record_of(f"{TRAIN} zero=2"))


def test_what_a_rehearsal_does_not_see_is_said_of_rehearsals_alone() -> None:
    record = record_of(f"{TRAIN} zero=2")
    assert "scratch inside kernels" in findings_by_kind(record)["rehearsed"].sentence
    record["world"]["kind"] = "torchrun"
    assert not {"rehearsed", "outside_torch"} & set(findings_by_kind(record))
    record["world"]["device"] = "cuda"
    assert "NCCL" in findings_by_kind(record)["outside_torch"].sentence


# Savings


def json_findings(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert explain.main([str(path), "--json", *options]) == 0
    findings: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return findings


def test_a_loss_in_chunks_is_proposed_where_logits_fill_the_peak_and_its_cost_is_said() -> None:
    record, before = parse(record_of(LOGITS), "it"), peak_of(LOGITS)
    (proposed,) = (
        Rehearsed(values, cost, peak_of(f"{LOGITS} loss=chunked"))
        for _, values, cost in candidates(record, settings_of(record, {}))
        if values == {"loss.kind": "chunked"}
    )
    saving, command, *_ = ranked(record, before, [proposed])
    assert saving.sentence.startswith(
        f"loss=chunked would save {size(before - peak_of(f'{LOGITS} loss=chunked'))}"
    )
    assert "logits computed twice" in saving.sentence
    assert command.sentence.endswith(" loss=chunked")
    chunked = parse(record_of(f"{LOGITS} loss=chunked"), "it")
    assert "loss.kind" not in [
        key for _, values, _ in candidates(chunked, settings_of(chunked, {})) for key in values
    ]


def test_a_saving_is_what_the_two_runs_differ_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(f"{TRAIN} zero=3 {SHALLOW}")
    record["world"]["kind"] = "torchrun"  # as if it had been measured
    findings = {each["kind"]: each for each in json_findings(put(tmp_path, record), capsys)}
    before = record["ranks"][0]["peak"]["bytes"]
    words = findings["command"]["sentence"].partition(" -m harness ")[2]
    assert findings["saving"]["bytes"] == before - peak_of(words)
    assert (
        f"from {size(before)} to {size(before - findings['saving']['bytes'])}"
        in findings["saving"]["sentence"]
    )
    assert findings["agreement"]["bytes"] == 0
    assert "to the byte" in findings["agreement"]["sentence"]
    assert findings["zero3"]["bytes"] == before - peak_of(f"{TRAIN} zero=2 {SHALLOW}")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(f"{LARGE} checkpointing=full", marks=pytest.mark.exhaustive),
        f"{TRAIN} zero=0 {SHALLOW} checkpointing=full",
    ],
)
def test_what_checkpointing_saves_is_what_a_run_without_it_takes_more(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(words)
    findings = {each["kind"]: each for each in json_findings(put(tmp_path, record), capsys)}
    saved = peak_of(words.removesuffix(" checkpointing=full")) - record["ranks"][0]["peak"]["bytes"]
    assert findings["recomputation"]["bytes"] == saved
    said = f"saves {size(saved)} here" if saved else "saves nothing here, and computes again for it"
    assert said in findings["recomputation"]["sentence"]


def test_a_record_that_its_rehearsal_does_not_reach_says_by_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(INFER)
    for rank in record["ranks"]:
        rank["peak"]["bytes"] += 4096 + 512
        rank["peak"]["categories"]["kernel"] = 512
    findings = {each["kind"]: each for each in json_findings(put(tmp_path, record), capsys)}
    assert findings["agreement"]["bytes"] == 4096
    assert "not exact" in findings["agreement"]["sentence"]


def test_a_saving_that_is_next_to_nothing_is_no_advice() -> None:
    record = parse(record_of(f"{TRAIN} zero=2"), "it")
    halved = Rehearsed({"train.micro_batch": 2, "train.accumulation": 2}, "time", 991)
    stage = Rehearsed({"zero.stage": 3}, "time", 1010)
    (only,) = ranked(record, 1000, [halved, stage])
    assert only.sentence.endswith(
        "as much as 1%: train.micro_batch=2 train.accumulation=2 (9 B less); zero=3 (10 B more)."
    )
    best, line, others = ranked(record, 1000, [halved._replace(peak=990), stage])
    assert (best.bytes, others.sentence) == (10, "Rehearsed too: zero=3 (10 B more).")
    assert line.sentence.endswith("train.micro_batch=2 train.accumulation=2")


def changes(record: Record) -> list[dict[str, Any]]:
    return [values for _, values, _ in candidates(record, settings_of(record, {}))]


def test_only_changes_that_keep_the_training_are_tried() -> None:
    record = record_of(f"{TRAIN} zero=2")
    halved = {"train.micro_batch": 2, "train.accumulation": 2}
    assert halved in changes(parse(record, "it"))
    for odd in (1, 3):
        record["config"]["train"]["micro_batch"] = odd
        assert not any("train.micro_batch" in values for values in changes(parse(record, "it")))


def test_what_the_settings_refuse_is_not_tried() -> None:
    tried = changes(parse(record_of(f"{TRAIN} zero=2"), "it"))
    assert {"zero.stage": 3} in tried
    assert {"zero.offload": "all"} not in tried  # takes ZeRO-3


def test_states_of_fewer_bits_are_tried_and_no_other_optimizer() -> None:
    tried = changes(parse(record_of(f"{TRAIN} zero=2 precision=bf16"), "it"))
    assert {"optimizer.kind": "adamw_8bit"} in tried
    assert {"optimizer.state": "bf16"} in tried
    tried = changes(parse(record_of(f"{TRAIN} zero=2 precision=fp32 optimizer=sgd"), "it"))
    assert not any(key.startswith("optimizer.") for values in tried for key in values)


def test_updates_in_backward_are_tried_where_nothing_needs_all_gradients() -> None:
    early = {"train.optimizer_in_backward": True}
    alone = TRAIN.replace("world.size=2", "world.size=1")
    assert early in changes(parse(record_of(f"{alone} zero=0 precision=fp32 train.clip=0"), "it"))
    assert early not in changes(parse(record_of(f"{alone} zero=0 precision=fp32"), "it"))


def test_activations_are_offloaded_from_a_gpu_alone() -> None:
    offloaded = {"checkpointing.offload": "cpu"}
    assert offloaded in changes(parse(record_of(f"{TRAIN} zero=2 hardware=a100-80gb"), "it"))
    assert not any(
        "checkpointing.offload" in each for each in changes(parse(record_of(f"{TRAIN} zero=2"), "it"))
    )
    on_gpu = f"{TRAIN} zero=2 hardware=a100-80gb checkpointing.offload=cpu"
    waiting = findings_by_kind(record_of(on_gpu))["waiting"]
    assert waiting.sentence.endswith("or more are pinned.")
    assert waiting.bytes == record_of(on_gpu)["ranks"][0]["on_host"]["activations"]


def test_caches_of_which_each_holds_less_are_tried_and_those_that_cannot_be_are_not_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = changes(parse(record_of(f"{INFER} generation.cache=quantized generation.cache_bits=4"), "it"))
    assert {"generation.cache": "dynamic", "generation.cache_bits": 8} in tried
    assert not any(
        values.get("generation.cache") == "offloaded" for values in tried
    )  # the model is on the host
    assert {"generation.cache": "quantized"} in changes(parse(record_of(INFER), "it"))
    said = json_findings(put(tmp_path, record_of(WINDOW)), capsys)
    assert not [each for each in said if "quantized" in each["sentence"]]  # a window's layers have none


def test_a_run_that_cannot_be_rehearsed_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(f"{TRAIN} zero=2")
    record["config"]["model"] |= {"path": "/no/such/model"}
    (saving,) = [each for each in json_findings(put(tmp_path, record), capsys) if each["kind"] == "saving"]
    assert "/no/such/model" in saving["sentence"]
    record["config"] = {}
    assert "saving" in {each["kind"] for each in json_findings(put(tmp_path, record), capsys)}


def test_a_rehearsal_that_fails_by_itself_is_a_failure_and_the_record_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(point: str, number: int) -> None:
        raise KeyError(f"out of luck at {point}")

    put(tmp_path, record_of(f"{TRAIN} zero=2 {SHALLOW}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(faults, "inject", fail)
    with ProcessPoolExecutor(1, get_context("fork")) as workers:  # a child has what this process has
        monkeypatch.setitem(pool._warm, str(tmp_path), workers)
        code = explain.main([str(tmp_path), "--json"])
    out, err = capsys.readouterr()
    assert code == 3
    assert "peak" in {each["kind"] for each in json.loads(out)}
    sentence = (
        "no change was rehearsed, because the run's own rehearsal failed: KeyError: 'out of luck at forward'"
    )
    said = [line for line in err.splitlines() if line.startswith("harness: ")]
    assert len(said) == 1
    assert said[0].startswith(f"harness: {sentence}")


def test_a_command_that_would_be_another_run_is_not_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(INFER)
    record["environment"]["command"] = ["mode=infer", "seed=7", "; rm -rf ~"]
    (line,) = [
        each["sentence"] for each in json_findings(put(tmp_path, record), capsys) if each["kind"] == "command"
    ]
    assert line == "python -m harness ... generation.batch=2"


# From disk to a terminal


def test_a_record_alone_needs_no_torch(tmp_path: Path) -> None:
    put(tmp_path, record_of(f"{TRAIN} zero=2"))
    program = (
        "import sys; from harness.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "explain", str(tmp_path), "--no-rehearsal"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "at its peak" in done.stdout


def test_it_fits_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main([str(put(tmp_path, record_of(f"{TRAIN} zero=3"))), "--no-rehearsal"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100


def test_control_characters_reach_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(f"{TRAIN} zero=2")
    evil = "\x1b[2J\r\u202e\n"
    record["model"]["name"] += evil
    record |= {"status": "failed", "failure": {"error": evil}}
    rank = record["ranks"][0]
    rank["peak"]["where"] |= {"module": evil, "phase": evil}
    for holding in rank["peak"]["holdings"]:
        holding["name"] += evil
    assert explain.main([str(put(tmp_path, record)), "--no-rehearsal"]) == 0
    printed = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in printed)


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    record = deepcopy(record_of(f"{TRAIN} zero=2"))
    change(record)
    return json.dumps(record)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "contains no record.json"),
        ('{"schema": "harness.rec', "cannot be read"),
        ('{"schema": "harness.record/9"}', "this version reads"),
        ("", "cannot be read"),
    ],
)
def test_what_is_no_record_is_one_sentence(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    assert explain.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r["ranks"][0]["peak"]["holdings"][0].update(bytes=-1), "holdings.0.bytes"),
        (lambda r: r["ranks"][0]["phases"][0].update(peak="all"), "phases.0.peak"),
        (
            lambda r: (
                r["inference"].update(kv_live=1.5)
                if "inference" in r
                else r.update(inference={"kv_live": 1.5})
            ),
            "inference.kv_live",
        ),
        (lambda r: r["environment"].update(command="x"), "environment.command"),
        (lambda r: r.update(config=[]), "config"),
    ],
)
def test_a_field_of_another_type_is_named(
    change: Callable[[dict[str, Any]], object], field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "record.json").write_text(broken(change))
    assert explain.main([str(tmp_path), "--no-rehearsal"]) == 2
    err = capsys.readouterr().err
    assert field in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["a", "b"], ["a", "--fast"]])
def test_a_wrong_request_is_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(words) == 2
    assert capsys.readouterr().err.startswith("harness: explain: ")


def test_an_adapter_is_said_to_spare_state_and_to_leave_what_is_saved_for_backward() -> None:
    words = f"{TRAIN} zero=1 adapter=lora"
    record = parse(record_of(words), "it")
    finding = findings_by_kind(record_of(words))["adapter"]
    saved, whole, model = record.worst.peak.saved or 0, record.worst.peak.bytes or 0, record.model
    assert finding.bytes == saved > 0
    assert f"{saved / whole:.0%}) are activations saved for backward" in finding.sentence
    frozen = (model.parameters or 0) - (model.trainable or 0)
    assert f"{size(12 * frozen // 2)} more on this rank (12 bytes a parameter)" in finding.sentence
    assert "checkpointing=full keeps" in finding.sentence
    recomputed = findings_by_kind(record_of(f"{words} checkpointing=full"))["adapter"].sentence
    assert "checkpointing=full keeps" not in recomputed
    assert "adapter" not in findings_by_kind(record_of(f"{TRAIN} zero=1"))
