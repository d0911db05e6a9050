"""A record of anybody's loop, and that the tools read it as they read a run's."""

import errno
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import harness
from harness.__main__ import main
from harness.analysis import compare
from harness.record import record_file, schema, trace
from harness.runtime import faults


class Wrapper(torch.nn.Module):
    """As DDP and DeepSpeed's engine hold what they wrap."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def stepped(model: torch.nn.Module, mode: str = "exact") -> harness.Ledger:
    """A ledger around one step of `model`."""
    optimizer = torch.optim.AdamW(model.parameters())
    with harness.Ledger(model=model, optimizer=optimizer, mode=mode) as ledger:
        model(torch.ones(2, 16, dtype=next(model.parameters()).dtype)).sum().backward()
        optimizer.step()
    return ledger


def small() -> torch.nn.Module:
    return torch.nn.Linear(16, 8)


def test_a_loop_numbers_its_steps_as_it_likes(tmp_path: Path) -> None:
    model = small()
    with harness.Ledger(model=model) as ledger:
        steps: list[Any] = [-1, np.int64(3), 3 * 10**9]
        for step in steps:
            with ledger.phase("odd", step, micro_batch=step):
                model(torch.ones(2, 16)).sum().backward()
    path = harness.save(ledger, tmp_path, model=model)
    phases = schema.parse(harness.read(str(tmp_path)), str(path)).ranks[0].phases
    assert [(phase.step, phase.micro_batch) for phase in phases if phase.phase == "odd"] == [
        (-1, -1),
        (3, 3),
        (3 * 10**9, 3 * 10**9),
    ]
    assert trace.read(tmp_path, 0) is not None


def test_names_are_texts(tmp_path: Path) -> None:
    model, epoch, name = small(), cast(str, 7), cast(str, 3)
    with harness.Ledger(model=model) as ledger, ledger.phase(epoch):
        tokens = torch.ones(2, 16)
        ledger.claim("inputs", name, tokens)
        model(tokens)
    path = harness.save(ledger, tmp_path, model=model)
    rank = schema.parse(harness.read(path), str(path)).ranks[0]
    assert "7" in {phase.phase for phase in rank.phases}
    assert rank.peak.holdings is not None
    assert ("inputs", "3") in {(each.category, each.name) for each in rank.peak.holdings}


@pytest.mark.parametrize("mode", ["exact", "phases", "off"])
def test_the_record_is_whole_and_holds_the_ledger_s_own_figures(tmp_path: Path, mode: str) -> None:
    model = small()
    ledger = stepped(model, mode)
    path = harness.save(ledger, tmp_path / "new/run", model=model)
    assert path == tmp_path / "new/run/record.json"
    actual = schema.parse(record_file.read(path), str(path))
    assert (actual.status, actual.mode, actual.world.kind, actual.world.size) == (
        "complete",
        "train",
        "loop",
        1,
    )
    (rank,) = actual.ranks
    if mode == "exact":
        assert (rank.peak.bytes, rank.peak.categories) == (ledger.peak.bytes, ledger.peak.categories)
        assert rank.allocator.unattributed == 0
    else:
        assert rank.peak.bytes is None  # nobody measured it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_the_one_inside_its_wrappers(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    harness.save(stepped(model), tmp_path, model=Wrapper(Wrapper(model)), mode="infer")
    actual = record_file.read(tmp_path)
    assert actual["mode"] == "infer"
    assert actual["model"] == {"name": "Linear", "parameters": 16 * 8 + 8, "dtype": str(dtype)[6:]}


def test_a_model_without_parameters_has_no_dtype(tmp_path: Path) -> None:
    harness.save(stepped(small()), tmp_path, model=torch.nn.ReLU())
    assert record_file.read(tmp_path)["model"] == {"name": "ReLU", "parameters": 0, "dtype": None}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the product's."""
    directory = tmp_path_factory.mktemp("rehearsed") / "run"
    words = ["mode=infer", "world=rehearsed", "world.size=1", "hardware=cpu", "generation.max_new_tokens=2"]
    assert main([*words, f"hydra.run.dir={directory}"]) == 0
    return directory


def test_a_loop_is_compared_with_a_run_of_the_product(
    tmp_path: Path, rehearsed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    harness.save(stepped(model), tmp_path, model=model)
    assert compare.main([str(tmp_path), str(rehearsed)]) == 0
    said = capsys.readouterr().out
    assert "Linear" in said
    assert "1 x cpu, float32" in said
    assert "At its peak infer tiny, rehearsed holds" in said or "At its peak infer tiny holds" in said


@pytest.mark.parametrize("words", [["roofline"], ["explain"]])
def test_the_other_tools_read_a_loop_too(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    harness.save(stepped(model), tmp_path, model=model)
    assert main([*words, str(tmp_path)]) == 0
    assert "train Linear, float32, 1 x cpu" in capsys.readouterr().out


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    model = small()
    path = harness.save(stepped(model), tmp_path, model=model)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="already contains a run's record; name another directory"):
        harness.save(stepped(model), tmp_path, model=model)
    assert path.read_bytes() == before


def test_what_cannot_be_saved_is_refused_with_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(ValueError, match="mode='test': a loop is one of train, infer"):
        harness.save(stepped(model), tmp_path / "run", model=model, mode="test")
    with (
        harness.Ledger(model=model) as ledger,
        pytest.raises(ValueError, match="still open: save its record after its block"),
    ):
        harness.save(ledger, tmp_path / "run", model=model)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run cannot be written: Not a directory"):
        harness.save(stepped(model), tmp_path / "file/run", model=model)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("name", "time"), [("record.json", 1), ("rank-0.parquet", 1), ("record.json", 2)])
def test_where_the_disk_is_full_nothing_is_left_and_the_same_directory_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, time: int
) -> None:
    model, passed = small(), []
    ledger = stepped(model)

    def full(point: str, number: int) -> None:
        passed.extend([point] * (point == f"write {name}"))
        if len(passed) == time:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(faults, "inject", full)
    with pytest.raises(
        ValueError, match=r"cannot be written: No space left on device; [\d,]+ bytes to write, "
    ):
        harness.save(ledger, tmp_path / "out", model=model)
    assert [*(tmp_path / "out").iterdir()] == []
    monkeypatch.setattr(faults, "inject", None)
    harness.save(ledger, tmp_path / "out", model=model)
    with pytest.raises(ValueError, match="already contains a run's record"):
        harness.save(ledger, tmp_path / "out", model=model)
    assert harness.read(tmp_path / "out")["status"] == "complete"
    assert trace.read(tmp_path / "out", 0) is not None


@pytest.mark.parametrize("name", ["trace", "trace/rank-0.parquet", "record.json"])
def test_a_link_that_leads_out_of_the_directory_is_not_written_through(tmp_path: Path, name: str) -> None:
    model, outside, link = small(), tmp_path / "outside", tmp_path / "out" / name
    outside.mkdir()
    (outside / "rank-0.parquet").write_text("mine")
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "rank-0.parquet" if "." in name else outside)
    if "/" in name:
        harness.save(stepped(model), tmp_path / "out", model=model)  # the link is replaced
    else:
        with pytest.raises(ValueError, match=r"is a link|already contains a run"):
            harness.save(stepped(model), tmp_path / "out", model=model)
    assert (outside / "rank-0.parquet").read_text() == "mine"
