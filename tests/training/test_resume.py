"""What a resumed run must have in common with the run that it continues, and which checkpoint it takes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config.load import Refusal
from harness.config.resume import CHANGEABLE, FIXED, FREE, FREE_GROUPS, PARTS, SINCE, differences
from harness.config.settings import described_fields
from harness.runtime.world import World
from harness.training import checkpoint
from tests.training.conftest import train

SAVED = ("train.save_every=1", "train.keep=3")


def test_every_field_is_in_the_identity_or_changes_no_number() -> None:
    keys = {*FIXED, *CHANGEABLE}
    for field in described_fields():
        places = [field in keys, PARTS.get(field) in keys, field in FREE]
        places.append(not any(places) and field.split(".")[0] in FREE_GROUPS)
        assert sum(places) == 1, f"{field}: say in harness/config/resume.py what a resumed run does with it"


def test_what_an_older_checkpoint_does_not_say_was_the_default() -> None:
    fields = described_fields()
    assert {*SINCE} <= {*FIXED, *CHANGEABLE}
    assert {key: fields[key].default for key in SINCE} == SINCE
    own = {**SINCE, "train.schedule": "cosine", "model.config.x": 1}
    old = {"train.schedule": "cosine", "model.config.x": 1}
    assert differences(old, own) == ([], [])
    assert differences(old, {**own, "optimizer.kind": "sgd", "adapter.kind": "lora"})[0] == [
        "optimizer.kind",
        "adapter.kind",
    ]


def test_every_name_is_that_of_a_field() -> None:
    fields = described_fields()
    assert {*FREE, *PARTS} <= {*fields}
    assert {*FIXED, *CHANGEABLE} <= {*fields, "model", "data"}


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that saved after each of its three steps."""
    directory = tmp_path_factory.mktemp("saved")
    (directory / "text.txt").write_text("It is a text to be learned from. " * 90)
    train(world, directory, *SAVED, *text(directory))
    return directory


def text(directory: Path) -> list[str]:
    return ["data=text", f"data.path={directory}/text.txt"]


def refused(world: World, saved: Path, tmp_path: Path, *words: str) -> str:
    with pytest.raises(Refusal) as refusal:
        train(world, tmp_path, *text(saved), *words, f"train.resume={saved}")
    return str(refusal.value)


@pytest.mark.parametrize(
    ("word", "before"),
    [
        ("train.learning_rate=0.5", "0.001"),
        ("train.betas=[0.5,0.9]", "[0.9,0.999]"),
        ("train.clip=0.25", "1.0"),
        ("train.schedule=linear", "cosine"),
        ("train.steps=4", "3"),
        ("train.warmup_steps=2", "0"),
        ("model.attention=eager", "sdpa"),
        ("data.validation=0.5", "0.02"),
        ("seed=7", "0"),
    ],
)
def test_another_setting_is_refused_with_both_values(
    world: World, saved: Path, tmp_path: Path, word: str, before: str
) -> None:
    sentence = refused(world, saved, tmp_path, word)
    key = word.partition("=")[0]
    assert sentence.startswith(f"{word}: {saved}/state/step-00000003 was saved with {before}; use that, or ")
    assert sentence.endswith(f"train.resume_changes=[{key}]")


def test_another_text_or_tokenizer_is_refused_and_the_same_text_elsewhere_is_not(
    world: World, saved: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.txt"
    shutil.copy(saved / "text.txt", moved)
    assert refused(world, saved, tmp_path, f"data.path={moved}").startswith(
        "train.steps=3: "
    )  # it is complete
    moved.write_text("It was a text to be learned from. " * 90)
    sentence = refused(world, saved, tmp_path, f"data.path={moved}")
    assert sentence.startswith("data=text ")
    assert sentence.endswith("train.resume_changes=[data]")


def test_another_shape_is_refused_by_its_key_and_cannot_be_allowed(
    world: World, saved: Path, tmp_path: Path
) -> None:
    sentence = refused(world, saved, tmp_path, "model.config.intermediate_size=128")
    assert sentence.startswith(
        f"model.config.intermediate_size=128: {saved}/state/step-00000003 was saved with 96"
    )
    assert sentence.endswith("begin a new run from its weights instead, with model.path=")
    for key in ("model.config", "model.config.hidden_size", "zero.stage", "world.size"):
        sentence = refused(world, saved, tmp_path, f"train.resume_changes=[{key}]")
        assert f"{key} cannot change in a resumed run" in sentence


def test_what_is_allowed_is_said_and_recorded_and_what_is_no_difference_is_refused(
    world: World, saved: Path, tmp_path: Path
) -> None:
    words = ("train.steps=4", "train.clip=0.5")
    both = refused(world, saved, tmp_path, *words)
    assert both.startswith("train.steps=4: ")
    assert "; train.clip too; use that, or train.resume_changes=[train.steps,train.clip]" in both
    allowed = "train.resume_changes=[train.steps,train.clip]"
    results, said = train(world, tmp_path, *text(saved), *words, allowed, f"train.resume={saved}")
    assert "train.steps is 4, and was 3 in " in said
    assert results.training is not None
    changes = [(each.key, each.saved, each.value) for each in results.training.changes]
    assert changes == [("train.steps", 3, 4), ("train.clip", 1.0, 0.5)]
    assert len(results.training.losses) == 1
    sentence = refused(world, saved, tmp_path, "train.steps=4", "train.resume_changes=[train.steps,seed]")
    assert f"seed is as it was saved in {saved}/state/step-00000003; leave it out" in sentence
    sentence = refused(world, saved, tmp_path, "train.resume_changes=[data.path]")
    assert "data.path is none of the keys that may change; use data: " in sentence


def rewritten(manifest: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(manifest.read_text())
    del content["sha256"]  # as before there was one
    change(content["identity"])
    manifest.write_text(json.dumps(content))


def test_a_checkpoint_that_does_not_say_goes_on_and_what_is_not_known_is_said(
    world: World, saved: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(saved, tmp_path / "old")

    def forget(identity: dict[str, object]) -> None:
        for key in [key for key in identity if key.startswith(("model.config.", "train.steps", "data"))]:
            del identity[key]

    rewritten(old / "state/step-00000003/manifest.json", forget)
    results, said = train(world, tmp_path, *text(saved), "train.steps=4", f"train.resume={old}")
    unknown = ["train.steps", "data", "data.tokenizer", "data.validation", "model.config"]
    assert f"does not say whether these were the same: {', '.join(unknown)}" in said
    assert results.training is not None
    assert results.training.unknown == unknown


def flip(file: Path, place: float) -> None:
    """Change one bit of a file, at this share of its length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)


def digit(file: Path) -> None:
    """Change one digit of the step in a manifest."""
    file.write_text(file.read_text().replace('"step": 3', '"step": 2'))


BROKEN: dict[str, Callable[[Path], None]] = {
    "a bit of a tensor": lambda step: flip(step / "rank-00000.safetensors", 0.9),
    "a bit of the header": lambda step: flip(step / "rank-00000.safetensors", 0.001),
    "a bit of the manifest": lambda step: flip(step / "manifest.json", 0.5),
    "a digit of the manifest": lambda step: digit(step / "manifest.json"),
    "a cut file": lambda step: os.truncate(step / "rank-00000.safetensors", 1000),
    "an empty manifest": lambda step: os.truncate(step / "manifest.json", 0),
    "no file": lambda step: (step / "rank-00000.safetensors").unlink(),
    "no manifest": lambda step: (step / "manifest.json").unlink(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_differs_from_what_was_written_is_never_loaded_and_the_one_before_is(
    saved: Path, tmp_path: Path, kind: str
) -> None:
    broken = shutil.copytree(saved / "state", tmp_path / "state")
    BROKEN[kind](broken / "step-00000003")
    taken, manifest, reasons = checkpoint.newest_whole(tmp_path)
    assert (taken.name, manifest["step"]) == ("step-00000002", 2)
    (reason,) = reasons
    assert reason.startswith("step-00000003 is corrupt: ")


def test_the_newest_is_by_its_step_never_by_time_and_deepspeed_s_own_files_mean_nothing(
    saved: Path, tmp_path: Path
) -> None:
    state = shutil.copytree(saved / "state", tmp_path / "state")
    for age, name in enumerate(("step-00000003", "step-00000002", "step-00000001")):
        for file in (state / name, *(state / name).iterdir()):
            os.utime(file, (2e9 + age * 1e6,) * 2)  # the oldest step has the latest time
    (state / "latest").write_text("global_step1\x00")
    (state / "global_step9").mkdir()
    (state / ".step-00000009.partial").mkdir()
    taken, _, reasons = checkpoint.newest_whole(tmp_path)
    assert (taken.name, reasons) == ("step-00000003", [])


def test_steps_are_ordered_as_numbers_and_a_renamed_checkpoint_is_not_taken(
    saved: Path, tmp_path: Path
) -> None:
    state = shutil.copytree(saved / "state", tmp_path / "state")
    shutil.move(state / "step-00000001", state / "step-00000007")
    taken, _, reasons = checkpoint.newest_whole(tmp_path)
    assert taken.name == "step-00000003"
    assert reasons == ["step-00000007 is corrupt: its manifest is of step 1"]


@pytest.mark.parametrize("saves", ["train.save_every=1", "train.save_on_term=true"])
def test_a_directory_with_the_checkpoints_of_another_run_is_refused(
    world: World, saved: Path, tmp_path: Path, saves: str
) -> None:
    shutil.copytree(saved / "state", tmp_path / "state")
    with pytest.raises(Refusal, match="its state/ has the checkpoints of another run"):
        train(world, tmp_path, saves)
    assert len([*(tmp_path / "state").iterdir()]) == 3
