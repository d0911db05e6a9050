"""What is said of a study's runs follows from their records, and what was not measured is told as such."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from harness.analysis.sweeps import batch as sweep_batch
from harness.analysis.sweeps import cache as sweep_cache
from harness.analysis.sweeps.batch import crossing
from harness.analysis.sweeps.cache import saved
from harness.analysis.sweeps.point import point
from harness.config.compose import compose
from harness.ledger.categories import CATEGORIES
from harness.record.schema import parse

GONE = dict.fromkeys(CATEGORIES, 0)


def record(
    batch: int = 1,
    prompt: int = 8,
    new: int = 5,
    cache: str = "static",
    step: float | None = 0.01,
    flops: int | None = 400,
    moved: int | None = 800,
    ceilings: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A run of one rank as its record tells it: `flops` and `moved` are those of the whole decode."""
    words = [
        *("mode=infer", "model=tiny", f"generation.cache={cache}", f"generation.batch={batch}"),
        *(f"generation.prompt_length={prompt}", f"generation.max_new_tokens={new}"),
    ]
    cfg: Any = OmegaConf.to_container(compose(words), resolve=True)
    cfg.pop("hydra")
    speed: dict[str, Any] = {}
    if step is not None:
        percentiles = dict.fromkeys(("p50", "p95", "p99"), step)
        speed = {
            "decode_tokens_per_second": batch / step,
            "latency": {"first_token_seconds": percentiles, "between_tokens_seconds": percentiles},
        }
    work = {"flops": flops, "read": moved, "written": None if moved is None else 0}
    return {
        "schema": "harness.record/1",
        "status": "complete",
        "mode": "infer",
        "world": {"kind": "torchrun", "size": 1, "device": "cpu"},
        "model": {"name": "tiny", "parameters": 10, "dtype": "bfloat16"},
        "config": cfg,
        "ranks": [
            {
                "rank": 0,
                "peak": {"bytes": 0, "where": None, "categories": GONE},
                "categories": {name: {"peak": 0, "end": 0} for name in CATEGORIES},
                "phases": [{"step": 0, "phase": "decode", "categories": GONE, **work}],
                "allocator": {"source": None, "peak": None, "unattributed": None},
            }
        ],
        "inference": {"kv_reserved": None if cache == "none" else 1000 * batch},
        "performance": speed,
        "ceilings": ceilings,
        **more,
    }


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """A function from records to the paths of runs that have them."""

    def write(*records: dict[str, Any]) -> list[str]:
        paths = []
        for number, each in enumerate(records):
            path = tmp_path / f"{number}.json"
            path.write_text(json.dumps(each))
            paths.append(str(path))
        return paths

    return write


MACHINE = {"source": "measured", "bandwidth": 100.0, "flops": 500.0, "dtype": "bfloat16"}


def test_a_point_is_what_was_asked_and_what_a_decode_took() -> None:
    actual = point(parse(record(batch=2, new=5, ceilings=MACHINE), "it"), "it")
    assert (actual.batch, actual.context, actual.steps, actual.kv) == (2, 13, 4, 2000)
    assert actual.each(actual.flops) == 100
    assert actual.intensity == 0.5
    assert actual.balance == 5
    assert actual.bound == 8.0  # 800 bytes at 100 a second
    assert actual.decode_seconds == pytest.approx(0.04)


def test_what_was_not_measured_is_null() -> None:
    actual = point(parse(record(step=None, flops=None, moved=None), "it"), "it")
    assert (actual.step_seconds, actual.decode_seconds, actual.tokens_per_second) == (None, None, None)
    assert (actual.intensity, actual.balance, actual.bound) == (None, None, None)


def test_a_step_is_compute_bound_from_where_its_intensity_is_the_machines_balance() -> None:
    def counted(batch: float) -> tuple[float, float, float]:
        return batch, 10 * batch, 100 + batch

    turn = crossing(counted(2), counted(8), 5.0)
    assert turn == 100
    _, flops, moved = counted(turn)
    assert flops / moved == 5
    assert crossing(counted(2), counted(8), 10.0) == float("inf")


def test_batching_tells_what_a_batch_brings_and_what_the_context_takes(written: Any, capsys: Any) -> None:
    runs = written(
        record(batch=8, prompt=8, step=0.02, flops=3200, moved=1500, ceilings=MACHINE),
        record(batch=1, prompt=8, step=0.01, flops=400, moved=800, ceilings=MACHINE),
        record(batch=1, prompt=64, step=0.011, flops=440, moved=900, ceilings=MACHINE),
        record(batch=8, prompt=64, step=0.03, flops=3500, moved=2300, ceilings=MACHINE),
    )
    assert sweep_batch.main(runs) == 0
    reported = capsys.readouterr().out
    assert (
        "At 13 tokens of context a step of 8 sequences takes 2.00 times one of 1, for 8 times the tokens."
        in reported
    )
    assert "What the longer context adds grows x 10.00" in reported
    assert "Predicted at 13 tokens: no batch is compute-bound" in reported
    lines = reported.splitlines()
    assert next(line.split()[:3] for line in lines if "batch 8 " in line) == ["batch", "8", "400"]


def test_caching_tells_what_a_cache_saves_for_its_bytes(written: Any, capsys: Any) -> None:
    runs = written(
        record(cache="none", new=5, flops=4_000),
        record(cache="none", new=9, flops=16_000, step=0.02),
        record(cache="static", new=5, flops=400),
        record(cache="static", new=9, flops=800),
    )
    assert sweep_cache.main(runs) == 0
    reported = capsys.readouterr().out
    assert "Without a cache, from 5 to 9 new tokens, a token takes x 2.00 and computes x 2.00." in reported
    assert (
        "With a static cache, from 5 to 9 new tokens, a token takes as long and computes as much." in reported
    )
    assert (
        "At 9 new tokens the static cache of 1,000 B saves 15.20 kFLOP: 15.20 FLOP for each of its bytes."
        in reported
    )
    points = [
        point(parse(record(cache=cache, flops=flops), "it"), "it")
        for cache, flops in (("static", 1), ("none", None))
    ]
    assert saved(*points) is None


@pytest.mark.parametrize("tool", [sweep_batch, sweep_cache])
def test_json_has_every_figure_and_null_for_what_was_not_measured(
    tool: Any, written: Any, capsys: Any
) -> None:
    assert tool.main([*written(record(batch=1), record(batch=1, new=9, step=None)), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["flops"] == 400
    assert second["step_seconds"] is None


@pytest.mark.parametrize(
    ("tool", "records", "reported"),
    [
        (sweep_batch, [record()], "name two runs or more"),
        (sweep_batch, [record(), record()], "have one batch and one context; name each point once"),
        (sweep_batch, [record(), record(batch=2, cache="none")], "of several models, caches, or kinds"),
        (sweep_batch, [record(), record(mode="train")], "is a run of mode=train"),
        (sweep_cache, [record(), record(batch=2)], "differ in model, batch or prompt"),
        (sweep_cache, [record(), {"schema": "other"}], "has schema 'other'"),
        (
            sweep_cache,
            [record(), record(config={"generation": {"lengths": "skewed"}})],
            "has prompts of its own",
        ),
        (
            sweep_cache,
            [record(), record(config={"nonsense": 1})],
            "has a config that cannot be read: nonsense=1",
        ),
    ],
)
def test_runs_that_are_no_study_are_one_sentence(
    tool: Any, records: list[dict[str, Any]], reported: str, written: Any, capsys: Any
) -> None:
    assert tool.main(written(*records)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert reported in err
    assert err.count("\n") == 1
