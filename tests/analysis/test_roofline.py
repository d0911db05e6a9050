"""What bounds a run, from records whose every figure is made up so that the answer is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.analysis.speed.roofline import line, sentence
from harness.analysis.speed.roofline_model import Bound, bounds
from harness.analysis.summary import show
from harness.config.compose import compose
from harness.record.schema import Record, parse

PARAMETERS, EMBEDDINGS, KV, ATTENTION = 5 * 10**9, 10**9, 10**6, 10**6
WEIGHTS = 2 * (PARAMETERS - EMBEDDINGS)
PROMPT, TOKENS = 100, 11
MACHINE = {"source": "measured", "bandwidth": 1e12, "flops": 1e13, "dtype": "bfloat16"}
"""It balances at 10 FLOP/B."""

Made = dict[str, Any]
ToolOutput = Callable[..., str]


def rank_of(phases: list[Made]) -> Made:
    """A rank of which only its work is known."""
    return {
        "rank": 0,
        "peak": {"bytes": None, "where": None, "categories": {}},
        "categories": {},
        "phases": phases,
        "allocator": {"peak": None, "unattributed": None},
    }


def phase_of(
    name: str, flops: float | None, moved: float | None, step: int = 0, number: int = 0, passes: int = 1
) -> Made:
    """A phase's work; half of it is read."""
    read = None if moved is None else int(moved) // 2
    written = None if read is None or moved is None else int(moved) - read
    work = {
        "flops": None if flops is None else int(flops),
        "read": read,
        "written": written,
        "passes": passes,
    }
    return {"step": step, "phase": name, "micro_batch": number, "categories": {}, **work}


def record_of(
    mode: str, phases: list[Made], *words: str, ceilings: Made | None = MACHINE, **more: Any
) -> Made:
    """A record as a run with these words leaves it."""
    cfg: Any = compose([f"mode={mode}", *words])
    return {
        "schema": "harness.record/1",
        "status": "complete",
        "mode": mode,
        "world": {"kind": "torchrun", "size": 1, "device": "cpu"},
        "model": {"name": "m", "parameters": PARAMETERS, "embeddings": EMBEDDINGS, "dtype": "bfloat16"},
        "config": {key: value for key, value in _plain(cfg).items() if key != "hydra"},
        "ranks": [rank_of(phases)],
        "ceilings": ceilings and {**ceilings},
        **more,
    }


def _plain(cfg: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    return dict(plain)


def trained(*steps: tuple[float, float, float], **more: Any) -> Made:
    """Training steps, each by the intensities of its phases; all move 1 GB."""
    phases = [
        phase_of(name, intensity * 1e9, 1e9, step)
        for step, intensities in enumerate(steps)
        for name, intensity in zip(("forward", "backward", "step"), intensities, strict=True)
    ]
    return record_of("train", phases, **more)


def generated(batch: float, cache: str = "dynamic", prompt: int = PROMPT, **more: Any) -> Made:
    """A batch of inference: a sequence moves nothing for itself but its cache."""
    context = prompt + (TOKENS + 1) / 2 if cache == "dynamic" else prompt + TOKENS
    flops = TOKENS * batch * (WEIGHTS + ATTENTION * context)
    moved = TOKENS * (WEIGHTS + batch * {"dynamic": 3, "static": 1}[cache] * KV * context)
    prefill = phase_of("prefill", batch * prompt * WEIGHTS, WEIGHTS + batch * prompt * 1e6)
    inference = {"prompts": batch, "prompt_tokens": batch * prompt, "cache": cache}
    inference |= {"kv_bytes_per_token": KV, "attention_flops_per_position": ATTENTION}
    phases = [prefill, phase_of("decode", flops, moved, passes=TOKENS)]
    words = (f"generation.cache={cache}", f"generation.batch={batch}", f"generation.prompt_length={prompt}")
    return record_of("infer", phases, *words, inference=inference, **more)


def of(record: Made, name: str) -> Bound:
    """What bounds that phase of it."""
    (actual,) = [each for each in bounds(parse(record, "it")) if each.phase == name]
    return actual


@pytest.fixture
def output_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> ToolOutput:
    """What the tool prints of records."""

    def run(*records: Made, options: tuple[str, ...] = (), code: int = 0) -> str:
        paths = []
        for number, record in enumerate(records):
            paths.append(tmp_path / f"{number}")
            paths[-1].mkdir(exist_ok=True)
            (paths[-1] / "record.json").write_text(json.dumps(record))
        assert main(["roofline", *map(str, paths), *options]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


def test_a_phase_is_bound_by_what_takes_longer_and_takes_no_less() -> None:
    record = trained((40, 5, 0))
    forward, backward, step = (of(record, name) for name in ("forward", "backward", "step"))
    assert (forward.by, forward.times, forward.at_best) == ("compute", 4.0, 40e9 / 1e13)
    assert (backward.by, backward.times, backward.at_best) == ("memory", 0.5, 1e9 / 1e12)
    assert sentence(step) == "step is memory-bound: it has no matrix product."
    assert of(record, "a step").at_best == pytest.approx(0.004 + 0.001 + 0.001)
    assert sentence(forward).startswith(
        "forward is compute-bound: computing takes 4.0 times as long as moving"
    )
    assert sentence(backward).startswith(
        "backward is memory-bound: moving takes 2.0 times as long as computing"
    )


def test_the_last_step_that_was_counted_is_the_one_that_counts() -> None:
    record = trained((99, 99, 99), (40, 5, 0))
    record["ranks"][0]["phases"] += [
        phase_of(name, None, None, 2) for name in ("forward", "backward", "step")
    ]
    assert of(record, "forward").intensity == 40


def test_micro_batches_of_a_step_add_up() -> None:
    record = trained((40, 5, 0))
    record["ranks"][0]["phases"].append(phase_of("forward", 20e9, 1e9, 0, 1))
    assert of(record, "forward").flops == 60 * 10**9


def test_the_stage_with_most_to_do_counts() -> None:
    record, other = trained((40, 5, 0)), trained((80, 5, 0))
    record["ranks"].append({**other["ranks"][0], "rank": 1, "stage": 1})
    assert of(record, "forward").intensity == 80


def test_utilization_is_of_dense_peak_and_of_weights_and_cache_read_once() -> None:
    took = [{"phase": "prefill", "seconds": 2.0, "steps": 3}, {"phase": "decode", "seconds": 0.5, "steps": 3}]
    record = generated(4, performance={"phases": took})
    decode, context = of(record, "decode"), PROMPT + (TOKENS + 1) / 2
    assert decode.mfu == pytest.approx(TOKENS * 4 * (WEIGHTS + ATTENTION * context) / 0.5 / 1e13)
    assert decode.mbu == pytest.approx(TOKENS * (WEIGHTS + 4 * KV * context) / 0.5 / 1e12)
    assert of(record, "prefill").mbu is None
    assert of(record, "a batch").seconds == 2.5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_batch_that_turns_a_decode_is_at_the_balance(cache: str) -> None:
    few = of(generated(2, cache), "decode")
    assert few.by == "memory"
    assert few.turn is not None
    assert few.turn.batch is not None
    below, above = int(few.turn.batch), int(few.turn.batch) + 1
    assert of(generated(below, cache), "decode").by == "memory"
    assert of(generated(above, cache), "decode").by == "compute"
    assert f"it would be compute-bound from a batch of {few.turn.batch:,.0f} on" in sentence(few)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_context_that_turns_a_decode_is_at_the_balance(cache: str) -> None:
    many = of(generated(64, cache), "decode")
    assert many.by == "compute"
    assert many.turn is not None
    assert many.turn.context is not None
    extra = TOKENS if cache == "static" else (TOKENS + 1) // 2
    turns = int(many.turn.context) - extra
    assert of(generated(64, cache, turns), "decode").by == "compute"
    assert of(generated(64, cache, turns + 2), "decode").by == "memory"
    assert f"beyond a context of {many.turn.context:,.0f}" in sentence(many)


def test_beyond_a_context_no_batch_turns_a_decode() -> None:
    short = of(generated(1), "decode")
    assert short.turn is not None
    assert short.turn.longest is not None
    longest = int(short.turn.longest)
    assert longest == pytest.approx(WEIGHTS / (10 * 3 * KV - ATTENTION), abs=1)
    long = of(generated(4096, prompt=longest), "decode")
    assert long.turn is not None
    assert (long.by, long.turn.batch) == ("memory", None)
    assert f"below a context of {short.turn.longest:,.0f} one would" in sentence(long)
    assert (
        "no batch would change that, because each sequence moves its own KV cache, which gives"
        in sentence(long)
    )


def test_the_tool_tells_every_phase_of_every_run(output_of: ToolOutput) -> None:
    said = output_of(trained((40, 5, 0)), generated(4))
    for words in ("forward", "a step", "decode", "a batch", "compute, x 4.0", "memory, x 2.0", "gpt-fast"):
        assert words in said
    assert "measured: 10.00 TFLOP/s of bfloat16, 1.00 TB/s; they balance at 10 FLOP/B" in said


def test_json_has_every_figure_and_null_for_what_is_not_known(output_of: ToolOutput) -> None:
    first, second = json.loads(
        output_of(trained((40, 5, 0)), generated(4, ceilings=None), options=("--json",))
    )
    assert first["phases"][0]["times"] == 4.0
    assert first["phases"][0]["mfu"] is None
    assert second["ceilings"] is None
    assert second["phases"][1]["flops"] > 0
    assert second["phases"][1]["bound"] is None


def test_a_run_is_held_against_another_machine_without_its_seconds(output_of: ToolOutput) -> None:
    took = [{"phase": name, "seconds": 1.0, "steps": 3} for name in ("forward", "backward", "step")]
    record = trained((40, 5, 0), performance={"phases": took})
    options = ("--json", "--hardware", "h100-sxm")
    (run,) = json.loads(output_of(record, options=options))
    assert run["ceilings"]["source"] == "h100-sxm"
    assert {each["seconds"] for each in run["phases"]} == {None}
    assert run["phases"][0]["balance"] == pytest.approx(989.5 / 3.35)
    record["world"]["device"] = "cuda"
    assert json.loads(output_of(record, options=options))[0]["phases"][0]["mfu"] == pytest.approx(
        40e9 / 989.5e12
    )


def test_an_estimate_stands_beside_what_is_at_best_and_a_phase_without_one_says_why(
    output_of: ToolOutput,
) -> None:
    record = trained((40, 5, 0))
    record["world"]["device"] = "cuda"
    forward, *others = record["ranks"][0]["phases"]
    forward["work"] = {"elementwise": {"flops": 0, "read": 10**10, "written": 10**10, "calls": 100}}
    for each in others:
        each["work"] = {"lookup": {"flops": 0, "read": 10**9, "written": 10**9, "calls": 1}}
    (run,) = json.loads(output_of(record, options=("--json", "--hardware", "h200")))
    first, *_, step = run["phases"]
    assert first["estimate"]["low"] < first["estimate"]["seconds"] < first["estimate"]["high"]
    assert first["no_estimate"] is None
    assert (step["estimate"], step["no_estimate"]) == (None, "a phase has none")
    printed = output_of(record, options=("--hardware", "h200"))
    assert "no estimate of backward and step: there are no rows of lookup on h200 to go by." in printed
    record["world"]["device"] = "cpu"
    assert "its operators are a CPU's" in output_of(record, options=("--hardware", "h200"))


def test_a_record_without_counts_or_ceilings_gets_a_sentence(output_of: ToolOutput) -> None:
    old = trained((40, 5, 0))
    old["ranks"][0]["phases"] = [{"step": 0, "phase": "forward", "micro_batch": 0, "categories": {}}]
    assert "no FLOPs and bytes moved; a run with ledger=exact of this version counts them" in output_of(old)
    assert "the record names no machine to compare it with; --hardware NAME gives one" in output_of(
        trained((4, 5, 0), ceilings=None)
    )
    rateless = {**MACHINE, "source": "h100-sxm", "flops": None, "dtype": "float32"}
    assert "h100-sxm: no rate of float32 is known, and 1.00 TB/s" in output_of(
        trained((4, 5, 0), ceilings=rateless)
    )


def test_a_config_of_another_version_loses_only_what_it_would_have_told() -> None:
    record = generated(4)
    record["config"] = {"unheard": 1}
    decode = of(record, "decode")
    assert (decode.by, decode.turn) == ("memory", None)


def test_what_is_wrong_is_a_sentence(
    output_of: ToolOutput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["roofline"]) == 2
    assert main(["roofline", str(tmp_path / "nowhere")]) == 2
    assert "no page with rates has that name; one of" in output_of(
        trained((4, 5, 0)), options=("--hardware", "x"), code=2
    )
    record = trained((4, 5, 0))
    record["ceilings"]["flops"] = -1.0
    assert "ceilings.flops=-1.0" in output_of(record, code=2)
    record = trained((4, 5, 0))
    record["ranks"][0]["phases"][0]["flops"] = "many"
    assert "flops='many'" in output_of(record, code=2)


def test_the_end_of_a_run_says_what_bounds_it_where_that_is_known() -> None:
    record = trained((40, 5, 0))
    assert (
        "bound: forward by compute, x 4.0, backward by memory, x 2.0, step by memory; a step takes 6.00 ms at"
        in show(record)
    )
    assert line(Record.model_validate(trained((40, 5, 0), ceilings=None))) == ""
