"""A disk that is full, read-only or unreliable: every rank ends alike, one sentence says which file and how many bytes,
nothing is left half, and what was whole stays whole."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import run
from harness.config.compose import compose
from harness.config.load import Refusal, load
from harness.record import record_file
from harness.record.schema import World
from harness.runtime import faults
from harness.training import checkpoint
from tests.distributed.conftest import NARROW, PRECISION, QUICK, RATED, Warm

FAULTY = str(Path(__file__).with_name("faulty.py"))
TRAIN = ("hardware=cpu", PRECISION, *RATED, "mode=train", "zero=2", *QUICK, *NARROW)
INFER = (
    *("hardware=cpu", PRECISION, *RATED, "mode=infer", *NARROW),
    *("generation.count=2", "generation.max_new_tokens=2", "generation.prompt_length=8"),
)
NO_ROOM = r"No space left on device; [\d,]+ bytes to write, [\d,]+ free"


@pytest.fixture
def failing(warm: Warm, tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """A function of a fault and overrides to the one sentence of a run that ends with 3 on both ranks, and the run's
    directory.
    """

    def ends(*words: str) -> tuple[str, Path]:
        directory = tmp_path / "out"
        said = warm.run([FAULTY, *words, f"hydra.run.dir={directory}"], code=3, directory=tmp_path)
        assert "Traceback" not in said
        assert not [*tmp_path.rglob("*.partial")]
        (sentence,) = [line for line in said.splitlines() if line.startswith("harness: ")]
        return sentence, directory

    return ends


def test_a_disk_that_is_full_at_the_first_record_leaves_nothing(
    failing: Callable[..., tuple[str, Path]],
) -> None:
    sentence, directory = failing("full", "write record.json", "-", "0", *TRAIN)
    assert re.fullmatch(
        rf"harness: rank 0 failed: NotWritten: {directory}/record.json: {NO_ROOM}", sentence
    ), sentence
    assert not directory.exists()


@pytest.mark.parametrize("kind", ["full-on", "denied-on"])
def test_a_disk_that_takes_nothing_more_leaves_the_record_as_it_was(
    failing: Callable[..., tuple[str, Path]], kind: str
) -> None:
    sentence, directory = failing(kind, "step", "1", "-", *TRAIN, "ledger.trace=false")
    assert re.match(rf"harness: rank 0 failed.*: NotWritten: {directory}/record.json: ", sentence), sentence
    assert re.search(NO_ROOM if kind == "full-on" else "Permission denied", sentence), sentence
    left = record_file.read(directory)
    assert (left["status"], len(left["training"]["losses"])) == ("failed", 1)


def test_a_record_that_cannot_be_written_for_a_while_ends_no_run(warm: Warm, tmp_path: Path) -> None:
    faults = ("full-on", "step", "1", "-", "and", "room", "step", "3", "-")
    words = (FAULTY, *faults, *TRAIN, "train.steps=5", f"hydra.run.dir={tmp_path}/out")
    said = warm.run(words, directory=tmp_path)
    (line,) = [line for line in said.splitlines() if "the run goes on" in line]
    problem = rf"the record is as it was, and the run goes on: {tmp_path}/out/record.json: {NO_ROOM}"
    assert re.fullmatch(problem, line), line
    left = record_file.read(tmp_path / "out")
    assert (left["status"], len(left["training"]["losses"])) == ("complete", 5)


@pytest.mark.parametrize("point", ["write failure.json", "meet"])
def test_ranks_that_cannot_meet_in_one_place_meet_in_another_and_one_of_them_says_why(
    failing: Callable[..., tuple[str, Path]], point: str
) -> None:
    """Each rank has a failure of its own, and the run's directory or torchrun's takes no file."""
    sentence, directory = failing("denied", point, "-", "-", "and", "raise", "step", "1", "-", *TRAIN)
    assert re.match(
        r"harness: rank [01] failed in step 1, step of micro-batch 0: ValueError: out of luck", sentence
    )
    assert record_file.read(directory)["status"] == "failed"


def test_generations_that_cannot_be_written_are_what_the_record_says(
    failing: Callable[..., tuple[str, Path]],
) -> None:
    sentence, directory = failing("full", "write generations.jsonl", "-", "0", *INFER)
    left = record_file.read(directory)
    assert re.search(rf"NotWritten: {directory}/generations.jsonl: {NO_ROOM}$", left["failure"]["error"])
    assert left["failure"]["rank"] == 0
    assert sentence.endswith(left["failure"]["error"])
    assert not (directory / "generations.jsonl").exists()


def test_a_trace_that_cannot_be_written_is_of_the_rank_that_could_not(
    failing: Callable[..., tuple[str, Path]],
) -> None:
    sentence, directory = failing("full", "write rank-1.parquet", "-", "1", *INFER, "ledger.trace=true")
    left = record_file.read(directory)
    assert re.search(rf"NotWritten: {directory}/trace/rank-1.parquet: {NO_ROOM}$", left["failure"]["error"])
    assert left["failure"]["rank"] == 1
    assert sentence.startswith("harness: rank 1 failed")
    assert (directory / "generations.jsonl").exists()


def test_a_run_goes_on_without_checkpoints_that_cannot_be_written_and_keeps_the_older_ones(
    failing: Callable[..., tuple[str, Path]],
) -> None:
    """Rank 1's disk is full at the second checkpoint, the third has no manifest, the answer to the fourth's rename is
    lost; and the export is more than the disk takes, in the middle of its writing."""
    sentence, directory = failing(
        *("full", "write state", "2", "1", "and", "denied", "write manifest.json", "3", "0"),
        *("and", "stale", "renamed step-00000004", "-", "0", "and", "small", "export", "-", "0"),
        *(*TRAIN, "train.steps=4", "train.save_every=1", "train.keep=2", "train.export=true"),
    )
    left = record_file.read(directory)
    assert len(left["training"]["losses"]) == 4
    second, third = left["training"]["unsaved"]
    assert (second["step"], third["step"]) == (2, 3)
    assert re.search(rf"step-00000002\.\S+\.partial/rank-00001.safetensors: {NO_ROOM}$", second["error"])
    assert third["error"].endswith("manifest.json: Permission denied")
    assert sorted(path.name for path in (directory / "state").iterdir()) == ["step-00000001", "step-00000004"]
    newest, manifest, skipped = checkpoint.newest_whole(directory)
    assert (newest.name, manifest["step"], skipped) == ("step-00000004", 4, [])
    assert left["status"] == "failed"
    assert re.search(
        rf"{directory}/checkpoint: File too large; [\d,]+ bytes to write, [\d,]+ free$", sentence
    )
    assert sentence.endswith(left["failure"]["error"])
    assert not (directory / "checkpoint").exists()


def test_a_run_that_a_signal_ends_does_not_say_that_it_has_saved_what_it_could_not(
    failing: Callable[..., tuple[str, Path]],
) -> None:
    sentence, directory = failing(
        *("term", "forward", "1", "0", "and", "full", "write state", "-", "1"),
        *(*TRAIN, "train.steps=5", "train.save_every=1", "train.save_on_term=true"),
    )
    failure = record_file.read(directory)["failure"]
    step, error = failure["where"]["step"], failure["error"]
    assert failure["where"]["phase"] == "checkpoint"
    assert re.search(rf"step-{step + 1:08d}\.\S+\.partial/rank-00001.safetensors: {NO_ROOM}$", error), error
    assert sentence.endswith(error)
    assert [*(directory / "state").iterdir()] == []


@pytest.mark.parametrize("moment", ["write record.json", "write config.yaml", "write deepspeed.json"])
def test_of_two_runs_in_one_directory_one_runs_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The other run asks for the directory at each moment at which the first one has not written all of it."""
    ways: dict[str, Path | Refusal] = {}

    def ask(name: str, seed: int) -> None:
        cfg = compose([*TRAIN, f"seed={seed}", f"hydra.run.dir={tmp_path}/out"])
        settings = load(cfg)
        head = record_file.head(settings, {}, [], World(kind="real", size=1, device="cpu"))
        try:
            ways[name] = run._make_directory(settings, cfg, 1, head)
        except Refusal as refusal:
            ways[name] = refusal

    def also(point: str, number: int) -> None:
        if point == moment and "second" not in ways:
            monkeypatch.setattr(faults, "inject", None)
            ask("second", 2)

    monkeypatch.setattr(faults, "inject", also)
    ask("first", 1)
    (winner,) = [name for name, way in ways.items() if isinstance(way, Path)]
    (refusal,) = [way for way in ways.values() if isinstance(way, Refusal)]
    assert winner == ("second" if moment == "write record.json" else "first")
    assert refusal.key == "hydra.run.dir"
    assert "already contains a run's record" in str(refusal)
    seed = {"first": 1, "second": 2}[winner]
    assert record_file.read(tmp_path / "out")["config"]["seed"] == seed
    assert f"\nseed: {seed}\n" in (tmp_path / "out/config.yaml").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.yaml", "deepspeed.json", "record.json"),
    ]


def asked_for(directory: Path) -> Path:
    """The directory of a run that asks for this one."""
    cfg = compose([*TRAIN, f"hydra.run.dir={directory}"])
    settings = load(cfg)
    head = record_file.head(settings, {}, [], World(kind="real", size=1, device="cpu"))
    return run._make_directory(settings, cfg, 1, head)


@pytest.mark.parametrize("name", run.PLACES)
def test_a_link_out_of_the_run_s_directory_is_refused_and_nothing_is_written_through_it(
    tmp_path: Path, name: str
) -> None:
    outside, directory = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    directory.mkdir()
    (directory / name).symlink_to(outside)
    with pytest.raises(
        Refusal, match=f"its {name} is a link, and a run writes nothing outside its directory"
    ):
        asked_for(directory)
    assert [*outside.iterdir()] == []
    assert [*directory.iterdir()] == [directory / name]
    (directory / name).unlink()
    (tmp_path / "elsewhere").symlink_to(directory)
    assert asked_for(tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_links_in_the_place_of_a_run_s_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    for name in ("config.yaml", "deepspeed.json", "failure.json"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    assert not any(each.is_symlink() for each in asked_for(tmp_path / "out").iterdir())
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_a_killed_run_left_half_is_gone_when_another_goes_on_from_it(warm: Warm, tmp_path: Path) -> None:
    out, words = tmp_path / "out", (*TRAIN, "ledger.trace=false", "train.save_every=1")
    kill = ("kill", "write manifest.json", "2", "0")
    warm.run([FAULTY, *kill, *words, f"hydra.run.dir={out}"], code=(-9, 3), directory=tmp_path)
    assert [each.parent.name for each in out.rglob("*.partial")] == ["state"]
    warm.run([*words, f"train.resume={out}", f"hydra.run.dir={tmp_path}/more"])
    assert not [*tmp_path.rglob("*.partial")]


def test_a_directory_without_a_record_is_used_and_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "config.yaml").write_text("seed: 7\n")
    assert asked_for(killed) == killed
    assert "seed: 7" not in (killed / "config.yaml").read_text()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Refusal, match="it cannot be written: File exists"):
        asked_for(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
