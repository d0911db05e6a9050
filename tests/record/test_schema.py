"""What a run writes is what the schema knows: no key is lost on the way back, and a newer version's keys do no harm."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness.__main__ import main
from harness.record import record_file
from harness.record.results import Inference, Model
from harness.record.schema import Record, World, parse
from harness.training import engine
from tests.keys import is_known

TINY = ("model=tiny", "model.config.num_hidden_layers=2", "hardware=cpu", "precision=fp32")
TRAIN = (*TINY, "mode=train", "train.steps=2", "train.sequence=16", "train.export=false")
INFER = (
    *TINY,
    "mode=infer",
    "generation.count=2",
    "generation.max_new_tokens=3",
    "generation.prompt_length=8",
)
SHARED = ("world=rehearsed", "world.size=4", "pipeline.stages=2")

RUNS = {
    "training": (*TRAIN, *SHARED, "train.accumulation=2"),
    "generation": (*INFER, *SHARED, "generation.tensor_parallel=2", "hardware=h100-sxm"),
}


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS.keys())
def test_the_schema_knows_every_key_that_a_rehearsal_writes(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert main([*words, f"hydra.run.dir={tmp_path}/out"]) == 0
    is_known(tmp_path / "out")


def test_the_schema_knows_every_key_of_a_loop(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    with harness.Ledger(model=model, lines=True) as ledger:
        model(torch.ones(2, 8)).sum().backward()
    harness.save(ledger, tmp_path, model=model)
    is_known(tmp_path)


def test_a_failed_rehearsal_leaves_what_the_schema_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> float:
        raise ArithmeticError("out of luck")

    monkeypatch.setattr(engine.Engine, "train_step", fail)
    assert main([*TRAIN, "world=rehearsed", "world.size=2", f"hydra.run.dir={tmp_path}/out"]) == 3
    is_known(tmp_path / "out")
    failure = record_file.read(tmp_path / "out")["failure"]
    assert failure["error"] == "ArithmeticError: out of luck"


def whole(**more: Any) -> dict[str, Any]:
    """The least that is a record."""
    world, model = {"size": 1, "device": "cpu"}, {"name": "m", "parameters": None, "dtype": None}
    return {"status": "complete", "mode": "train", "world": world, "model": model, "ranks": [], **more}


def test_a_newer_version_s_keys_do_no_harm() -> None:
    tree = whole(newer={"a": 1}, performance={"newer": 2, "tokens_per_second": 3.0})
    assert parse(tree, "it").performance.tokens_per_second == 3.0


def test_a_text_from_disk_is_printable_and_one_of_our_own_is_kept(tmp_path: Path) -> None:
    world, name = World(size=1, device="cpu"), "line\nend\x1b[2J"
    model = Model(name=name, parameters=None, dtype=None)
    record_file.write(tmp_path, Record(status="complete", mode="train", world=world, model=model, ranks=[]))
    written = record_file.read(tmp_path)
    assert written["model"]["name"] == name
    assert parse(written, "it").model.name == "line?end?[2J"


def test_null_is_written_where_it_was_set_and_nothing_where_it_was_not() -> None:
    assert parse(whole(ceilings=None), "it").tree() == whole(ceilings=None)
    assert parse(whole(), "it").tree() == whole()
    assert parse(whole(ceilings=None), "it").limits.balance is None


def test_a_part_takes_no_field_that_it_does_not_have() -> None:
    inference = Inference(prompts=2).plus(kv_filled=3, pages=None)
    assert json.dumps(inference.tree()) == '{"prompts": 2, "kv_filled": 3, "pages": null}'
    with pytest.raises(TypeError, match="Inference has no field kv_full"):
        inference.plus(kv_full=3)
    with pytest.raises(ValueError, match="kv_filled"):
        inference.plus(kv_filled=-1)
