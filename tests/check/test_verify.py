"""`harness verify`: real runs beside rehearsals on this machine, what they leave, and what a rehearsal says of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.check import machine, verify, verify_page
from harness.config.compose import compose
from harness.config.hardware_page import of_device
from harness.config.load import load
from harness.model.resolve import resolve
from harness.record import verified
from harness.record.schema import Record
from harness.record.verified import Figure, Pair, Verified
from harness.rehearsal import UNVERIFIED
from harness.rehearsal.all_ranks import described

HERE = machine.Machine("a-processor", "cpu", "cpu", "A processor")
PAIR = ("train-zero0", "infer-dynamic")


def test_real_runs_on_this_processor_equal_their_rehearsals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "--only", ",".join(PAIR), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    left = verified.read(file)
    assert tuple(pair.name for pair in left.pairs) == PAIR
    equal = {figure.name for pair in left.pairs for figure in pair.figures if figure.difference == 0}
    assert {
        "activations, peak",
        "parameters, end",
        "optimizer, peak",
        "kv_cache, peak",
        "unattributed",
    } <= equal
    assert (left.device, left.complete, left.within) == ("cpu", False, 0)
    assert "figures of 2 runs are equal to the byte" in said
    assert "no rehearsal calls itself verified" in said
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    assert f"torch {left.packages['torch']}" in page
    assert "activations, peak" in page


@pytest.fixture
def rehearsal() -> verify.Run:
    return verify._rehearsed(verify.CASES[0], "cpu")


def off_by(record: Record, nbytes: int) -> Record:
    """`record` with other gradients, and with an allocator's books, as a real run has."""
    tree = record.tree()
    tree["ranks"][0]["allocator"]["unattributed"] = 0
    tree["ranks"][0]["categories"]["gradients"]["peak"] += nbytes
    return Record.model_validate(tree)


@pytest.fixture
def without_runs(monkeypatch: pytest.MonkeyPatch, rehearsal: verify.Run) -> None:
    """The real run is 512 bytes off the rehearsal."""
    monkeypatch.setattr(machine, "here", lambda page: HERE)
    monkeypatch.setattr(verify, "_real", lambda case: verify.Run(off_by(rehearsal.record, 512), 1.0))


@pytest.mark.usefixtures("without_runs")
def test_a_figure_that_differs_is_named_and_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", "--only", "train-zero0", "--out", str(tmp_path)]
    assert main(words) == 1
    assert "train-zero0: 1 figures differ, gradients, peak most, by -512 B" in capsys.readouterr().out
    assert verified.read(tmp_path / "a-processor.json").within == 512
    assert main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["pairs"][0]["name"] == "train-zero0"


def test_a_figure_that_only_one_of_them_has_differs(rehearsal: verify.Run) -> None:
    without_books = rehearsal.record
    figures = [*verify.figures(without_books, rehearsal.record)]
    pair = Pair(name="x", config=[], figures=figures, real_seconds=1.0, rehearsed_seconds=1.0)
    assert [each.name for each in pair.apart] == ["unattributed"]


def test_what_differs_by_nature_is_shown_and_not_judged(rehearsal: verify.Run) -> None:
    other = off_by(rehearsal.record, 512)
    only_parameters = [*verify.figures(other, rehearsal.record, ["parameters"])]
    assert {each.name for each in only_parameters if each.judged} == {"parameters, peak", "parameters, end"}
    pair = Pair(name="x", config=[], figures=only_parameters, real_seconds=1.0, rehearsed_seconds=1.0)
    assert pair.apart == []
    assert "-512 B *" in verify_page.text(known(pair))


def test_a_run_that_fails_is_exit_code_3_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "here", lambda page: HERE)
    monkeypatch.setattr(verify, "CASES", (verify.Case("wrong", ("mode=train", "train.steps=-1")),))
    assert main(["verify", "--out", str(tmp_path)]) == 3
    assert "wrong: the run ended with 2: harness: train.steps=-1" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "train-zero9"], "--only train-zero9: on this device there are train-zero0"),
        (["--only", "infer-compiled"], "--only infer-compiled: on this device"),
        (["--only", "train-zero0", "--quick"], "either --quick or --only"),
        (["--out", __file__], "it cannot be made: File exists"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    monkeypatch.setattr(machine, "here", lambda page: HERE)
    assert main(["verify", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("harness: ")
    assert sentence in said


@pytest.mark.parametrize(
    ("device_name", "page"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA H200", "h200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce GTX 1080 Ti", None),
    ],
)
def test_a_gpu_s_name_says_its_page(device_name: str, page: str | None) -> None:
    assert of_device(device_name) == page


def said(device_name: str | None, processes: int = 1) -> dict[str, Any]:
    more = {"processes": processes, "driver": "580.1"} if device_name else {}
    return {"device_name": device_name, "processor": "AMD EPYC(tm) 7B13", **more}


def test_a_machine_is_its_gpu_s_page_or_its_processor() -> None:
    assert machine.of(said(None)) == ("amd-epyc-tm-7b13", "cpu", "cpu", "AMD EPYC(tm) 7B13", None, "")
    assert machine.of(said("NVIDIA L4")) == ("l4", "l4", "cuda", "NVIDIA L4", "580.1", "")
    assert machine.of(said("NVIDIA L4", 3)).note == "others used this GPU, with 2 processes"
    assert machine.of(said("NVIDIA L40"), "l4").page == "l4"
    with pytest.raises(ValueError, match="no page in conf/hardware is of 'NVIDIA L40'; add one, or name one"):
        machine.of(said("NVIDIA L40"))
    with pytest.raises(ValueError, match="no page of a GPU has that name"):
        machine.of(said("NVIDIA L40"), "cpu")
    with pytest.raises(ValueError, match="there is no GPU here"):
        machine.of(said(None), "l4")


def known(*pairs: Pair, hardware: str = "l4", device: str = "cuda", complete: bool = True) -> Verified:
    return Verified(
        hardware=hardware,
        device=device,
        device_name="NVIDIA L4",
        driver=None,
        date="2026-01-01",
        python="3.11",
        platform="Linux",
        packages={"torch": "2.13.0"},
        complete=complete,
        pairs=[*pairs],
    )


def rehearsal_says(directory: Path, monkeypatch: pytest.MonkeyPatch, file: Verified | None) -> str | None:
    """What a rehearsal for an L4 says of itself where `directory` has this file."""
    monkeypatch.setenv(verified.VARIABLE, str(directory))
    if file is not None:
        (directory / "l4.json").write_text(verified.text(file), encoding="utf-8")
    words = ["mode=train", "model=tiny", "world=rehearsed", "world.size=1", "hardware=l4"]
    return described(resolve(load(compose(words)))).verified


def test_a_rehearsal_says_where_it_was_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rehearsal_says(tmp_path, monkeypatch, None) == UNVERIFIED
    figures = [
        Figure(name="peak", real=10, rehearsed=1034),
        Figure(name="x", real=0, rehearsed=4096, judged=False),
    ]
    pair = Pair(name="x", config=[], figures=figures, real_seconds=1.0, rehearsed_seconds=1.0)
    sentence = "verified on l4, within 1,024 bytes (torch 2.13.0)"
    assert rehearsal_says(tmp_path, monkeypatch, known(pair)) == sentence


@pytest.mark.parametrize(
    "file", [known(complete=False), known(device="cpu"), known(hardware="t4")], ids=["part", "cpu", "other"]
)
def test_a_file_that_is_not_of_the_whole_card_verifies_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Verified
) -> None:
    assert rehearsal_says(tmp_path, monkeypatch, file) == UNVERIFIED


def test_a_file_that_cannot_be_read_verifies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "l4.json").write_text("{", encoding="utf-8")
    assert rehearsal_says(tmp_path, monkeypatch, None) == UNVERIFIED
