"""`deepspeed.config=FILE`: each key is the setting that it is, goes to DeepSpeed as it is, or is named."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.config.compose import compose
from harness.config.deepspeed_file import expanded
from harness.config.deepspeed_json import MOST_BYTES
from harness.config.load import load
from harness.config.rules import packages
from harness.config.settings import Refusal, Settings
from harness.training.deepspeed_config import whole_config

ZERO = "zero_optimization"
MICRO = {"train_micro_batch_size_per_gpu": 2}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test's file is."""
    return tmp_path / "ds_config.json"


def settings_of(file: Path, tree: Any, *words: str) -> Settings:
    """The settings of a file with `tree` in it, and of `words`."""
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return load(compose(["mode=train", f"deepspeed.config={file}", *words]))


def refused(file: Path, tree: Any, *words: str) -> str:
    with pytest.raises(Refusal) as caught:
        settings_of(file, tree, *words)
    return str(caught.value)


def test_its_keys_become_the_settings_that_they_are(file: Path) -> None:
    tree = {
        **MICRO,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 5, "total_num_steps": 40, "warmup_max_lr": 3e-4},
        },
        ZERO: {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu", "pin_memory": False},
            "reduce_bucket_size": 5e4,
            "allgather_bucket_size": 60_000,
            "stage3_prefetch_bucket_size": 7000,
            "stage3_param_persistence_threshold": 80,
            "overlap_comm": False,
            "sub_group_size": 1e9,
        },
    }
    actual = settings_of(file, tree)
    assert (actual.train.micro_batch, actual.train.accumulation, actual.train.clip) == (2, 3, 0.5)
    assert (actual.train.learning_rate, actual.train.betas, actual.train.epsilon) == (3e-4, (0.9, 0.95), 1e-6)
    assert (actual.train.weight_decay, actual.train.schedule) == (0, "linear")
    assert (actual.train.warmup_steps, actual.train.steps) == (5, 40)
    assert actual.precision == "bf16"
    assert (actual.zero.stage, actual.zero.offload) == (3, "all")
    assert (actual.zero.reduce_bucket_size, actual.zero.allgather_bucket_size) == (50_000, 60_000)
    assert (actual.zero.prefetch_bucket_size, actual.zero.persistence_threshold) == (7000, 80)
    options = {ZERO: {"offload_param": {"pin_memory": False}, "sub_group_size": 10**9}}
    assert actual.deepspeed.options == options
    assert actual.deepspeed.config is None


def test_what_it_leaves_out_is_deepspeed_s_own(file: Path) -> None:
    actual = settings_of(file, {**MICRO, ZERO: {"stage": 3}})
    assert (actual.zero.reduce_bucket_size, actual.zero.allgather_bucket_size) == (500_000_000, 500_000_000)
    assert (actual.zero.prefetch_bucket_size, actual.zero.persistence_threshold) == (50_000_000, 100_000)
    assert (actual.precision, actual.train.clip) == ("fp32", 1.0)
    assert actual.deepspeed.options == {ZERO: {"overlap_comm": True}}
    assert settings_of(file, MICRO).zero.stage == 0


def test_a_schedule_and_an_optimizer_bring_deepspeed_s_defaults(file: Path) -> None:
    tree = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    actual = settings_of(file, tree, "train.steps=2000").train
    assert (actual.weight_decay, actual.warmup_steps, actual.schedule) == (0.0, 1000, "constant")


MUON = {"type": "Muon", "params": {"ns_method": "standard"}}


@pytest.mark.parametrize(
    "words",
    [
        "optimizer=adamw train.betas=[0.8,0.9] train.fused=true",
        "optimizer=adamw_8bit train.epsilon=1e-6",
        "optimizer=adafactor zero=0 train.weight_decay=0.5",
        "optimizer=muon zero=2 train.clip=0 optimizer.momentum=0.5",
        "optimizer=muon zero=3 train.clip=0",
        "optimizer=sgd",
        "optimizer=sgd optimizer.momentum=0.9 zero=2 precision=bf16 optimizer.state=bf16",
        "optimizer=lion train.betas=[0.9,0.99]",
    ],
)
def test_the_file_of_a_run_means_its_own_optimizer(
    file: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        packages, "is_installed", lambda package: True
    )  # a file is read without the packages too
    given = load(compose(["mode=train", "precision=fp32", *words.split()]))
    read = settings_of(file, whole_config(given, 1))
    momentum = {"sgd": 0.0, "muon": 0.95}.get(given.optimizer.kind)
    own = (
        given.optimizer
        if given.optimizer.momentum is not None
        else replace(given.optimizer, momentum=momentum)
    )
    assert read.optimizer == own
    assert read.train == given.train
    assert read.precision == given.precision


def test_an_optimizer_that_a_file_names_without_its_options_has_deepspeed_s(file: Path) -> None:
    tree = {**MICRO, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
    given = settings_of(file, tree)
    assert (given.optimizer.kind, given.optimizer.momentum, given.train.weight_decay) == ("sgd", 0.9, 0.0)
    muon = {"type": "Muon", "params": {"ns_method": "standard"}}
    given = settings_of(file, {**MICRO, "optimizer": muon})
    assert (given.train.betas, given.train.epsilon, given.train.weight_decay) == ((0.9, 0.95), 1e-10, 0.0)
    assert refused(file, {**MICRO, "optimizer": muon}, "optimizer=sgd").startswith("optimizer=sgd: ")


def test_what_it_leaves_out_yields_to_the_user(file: Path) -> None:
    option = "deepspeed.options.zero_optimization.overlap_comm"
    assert settings_of(file, MICRO, "zero=3", f"{option}=false").deepspeed.options == {
        ZERO: {"overlap_comm": False}
    }
    actual = settings_of(file, MICRO, "zero=2", "precision=bf16", "zero.reduce_bucket_size=70")
    assert (actual.zero.stage, actual.precision, actual.zero.reduce_bucket_size) == (2, "bf16", 70)


def test_auto_is_our_own_choice_and_is_said(file: Path) -> None:
    auto = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": "auto"}
    tree = {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        ZERO: auto,
        "steps_per_print": 5,
    }
    actual, plain = settings_of(file, tree), load(compose(["mode=train"]))
    assert actual.train.micro_batch == plain.train.micro_batch
    assert actual.zero.reduce_bucket_size == plain.zero.reduce_bucket_size
    assert actual.precision == "auto"
    reasons = expanded([f"deepspeed.config={file}"]).reasons(actual)
    assert reasons["train.micro_batch"] == f"{plain.train.micro_batch}: auto in {file}"
    assert reasons["zero.reduce_bucket_size"] == f"{plain.zero.reduce_bucket_size}: auto in {file}"
    assert "no effect here: steps_per_print" in reasons["deepspeed.config"]
    assert "zero.allgather_bucket_size=500000000" in reasons["deepspeed.config"]


def test_a_typed_value_that_differs_is_refused_with_both_names(file: Path) -> None:
    said = refused(file, MICRO, "train.micro_batch=4")
    assert said.startswith(f"train.micro_batch=4: {file} has train_micro_batch_size_per_gpu=2;")
    assert refused(file, {ZERO: {"stage": 2}}, "zero=3").startswith(f"zero=3: {file} has {ZERO}.stage=2;")
    assert settings_of(file, {ZERO: {"stage": 2}}, "zero.stage=2").zero.stage == 2
    overlapped, option = (
        {ZERO: {"stage": 2, "overlap_comm": True}},
        "deepspeed.options.zero_optimization.overlap_comm",
    )
    assert refused(file, overlapped, f"{option}=false").startswith(
        f"{option}=false: {file} has {ZERO}.overlap_comm=true;"
    )
    assert settings_of(file, overlapped, f"++{option}=true").deepspeed.options == {
        ZERO: {"overlap_comm": True}
    }
    assert refused(file, MICRO, "++train.micro_batch=4").startswith("train.micro_batch=4:")
    offloaded = {ZERO: {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert 'offload_optimizer.device="cpu"' in refused(file, offloaded, "zero.offload=none")
    same = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
    assert settings_of(file, same, "train.learning_rate=0.0001").train.learning_rate == 1e-4
    auto = {"train_micro_batch_size_per_gpu": "auto"}
    assert settings_of(file, auto, "train.micro_batch=4").train.micro_batch == 4


@pytest.mark.parametrize(
    ("tree", "words", "micro", "accumulation"),
    [
        ({"train_batch_size": 24}, (), 6, 1),
        ({"train_batch_size": 24, **MICRO}, (), 2, 3),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 2}, (), 3, 2),
        ({"train_batch_size": 24, **MICRO}, ("pipeline.stages=2",), 2, 6),
        ({"train_batch_size": 24}, ("train.micro_batch=3",), 3, 2),
    ],
)
def test_of_the_batch_two_parts_give_the_third(
    file: Path, tree: dict[str, Any], words: tuple[str, ...], micro: int, accumulation: int
) -> None:
    rehearsed = ("world=rehearsed", "world.size=4")
    actual = settings_of(file, tree, *rehearsed, *words).train
    assert (actual.micro_batch, actual.accumulation) == (micro, accumulation)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({ZERO: {"stagee": 2}}, "did you mean zero_optimization.stage?"),
        ({"zero_optimisation": {"stage": 2}}, "no such key; did you mean zero_optimization"),
        ({"qqqq": 1}, "no such key"),
        ({ZERO: {"stage": 5}}, "should be less than or equal to 3"),
        ({ZERO: {"stage": True}}, "should be a"),
        ({ZERO: True}, "should have keys"),
        ({ZERO: {"overlap_comm": "perhaps"}}, "overlap_comm"),
        ({ZERO: {"cpu_offload": True}}, "the old name"),
        ({ZERO: {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "write cpu"),
        ({ZERO: {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_optimizer"),
        ({ZERO: {"stage": 3, "zero_quantized_weights": True}}, "set it to false"),
        ({ZERO: {"stage": 2, "reduce_scatter": False}}, "set it to true"),
        ({ZERO: {"stage": 3, "reduce_scatter": True}, "optimizer": MUON}, "set it to false"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}}, 'write "bf16"'),
        ({"bfloat16": {"enabled": True}}, "write bf16"),
        ({"compression_training": {"enabled": True}}, "leave it out"),
        ({"progressive_layer_drop": {"enabled": True}}, "leave it out"),
        ({"autotuning": {"enabled": True}}, "harness fit"),
        ({"tensorboard": {"enabled": True}}, "record.json"),
        ({"optimizer": {"type": "Lamb"}}, "AdamW"),
        ({"optimizer": {"type": "Muon"}}, "write standard"),
        ({"optimizer": {"type": "SGD", "params": {"nesterov": True}}}, "momentum is plain here"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "set both, or none"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "betas"),
        ({"scheduler": {"type": "OneCycle"}}, "no such schedule"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}}, "linear"),
        (
            {
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}},
            },
            "its optimizer.params.lr=0.001 differs",
        ),
        ({"train_batch_size": 7, **MICRO}, "is 6; change one"),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 4}, "change one"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "checkpointing=full"),
        ([1], "it has no keys at its top"),
        (" \n", "it is empty"),
        ("{" * 3, "it is no JSON"),
        ('{"a": ' * 100_000, "it is no JSON"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "is in it twice"),
        ('{"gradient_clipping": NaN}', "NaN is not a number"),
        ('{"gradient_clipping": 1e999}', "should be"),
    ],
)
def test_what_cannot_be_is_named(file: Path, tree: Any, sentence: str) -> None:
    said = refused(file, tree)
    assert said.startswith(f"deepspeed.config={file}: ")
    assert sentence in said
    assert "\n" not in said


def test_a_feature_that_is_off_is_accepted(file: Path) -> None:
    off = {
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": True},
        "wandb": {"enabled": False, "project": "x"},
        "flops_profiler": {"enabled": False},
        "sparse_gradients": False,
        "prescale_gradients": False,
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        ZERO: {
            "stage": 1,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "reduce_scatter": True,
        },
    }
    actual = settings_of(file, off)
    assert (actual.precision, actual.zero.offload, actual.deepspeed.options) == ("bf16", "none", {})


def test_quotes_around_a_typed_value_change_nothing(file: Path) -> None:
    """The jobs of a sweep have them, around an option that looks like a number."""
    auto = {"train_batch_size": 8, ZERO: {"stage": "auto"}}
    plain = settings_of(file, auto, "zero=3", "world.size=2", "train.micro_batch=2")
    assert settings_of(file, auto, "zero='3'", "world.size='2'", "train.micro_batch='2'") == plain
    assert plain.deepspeed.options == {ZERO: {"overlap_comm": True}}
    assert refused(file, {ZERO: {"stage": 2}}, "zero='3'").startswith(f"zero=3: {file} has ")


def test_a_flag_s_value_is_no_typed_value(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(json.dumps(MICRO))
    assert main(["--cfg", "job", "--package", "train.micro_batch", f"deepspeed.config={file}"]) == 0
    assert capsys.readouterr().out == "2\n"
    words = ["--package", "deepspeed.config"]
    assert expanded([*words, f"deepspeed.config={file}"]).arguments[:2] == words


def test_a_config_of_the_user_s_own_cannot_name_it(file: Path) -> None:
    file.write_text(json.dumps(MICRO))
    (file.parent / "mine.yaml").write_text(f"defaults: [config, _self_]\ndeepspeed: {{config: {file}}}\n")
    with pytest.raises(Refusal, match="it is read where it is typed"):
        load(compose([f"--config-dir={file.parent}", "--config-name=mine"]))


def test_comments_and_trailing_commas_are_read_as_deepspeed_reads_them(file: Path) -> None:
    pytest.importorskip("hjson")
    actual = settings_of(file, '{\n // a comment\n "gradient_clipping": 0.25, # another\n}')
    assert actual.train.clip == 0.25


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    def said(path: object) -> str:
        with pytest.raises(Refusal) as caught:
            expanded([f"deepspeed.config={path}"])
        return str(caught.value)

    (tmp_path / "large.json").write_text(" " * (MOST_BYTES + 1))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01\x80")
    assert "No such file" in said(tmp_path / "missing.json")
    assert "a directory" in said(tmp_path)
    assert "a directory or a device" in said("/dev/null")
    assert "bytes, and a config at most" in said(tmp_path / "large.json")
    assert "text" in said(tmp_path / "binary.json")
    assert "in base64" in said(base64.urlsafe_b64encode(b'{"train_batch_size": 1}').decode())


def test_home_is_where_a_path_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.125}')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(compose(["deepspeed.config=~/ds.json"])).train.clip == 0.125


def test_inference_takes_none(file: Path) -> None:
    file.write_text("{}")
    with pytest.raises(Refusal, match="configures training"):
        compose(["mode=infer", f"deepspeed.config={file}"])
    with pytest.raises(Refusal, match="configures training"):
        load(compose(["mode=infer", "deepspeed.options.zero_optimization.overlap_comm=true"]))


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("zero_optimization.stage=2", "use zero.stage="),
        ("zero_optimization.overlap_com=true", "did you mean zero_optimization.overlap_comm?"),
        ("zero_optimization.overlap_comm=perhaps", "boolean"),
        ("zero_optimization.legacy_stage1=true", "set it to false"),
        ("steps_per_print=5", "has no effect"),
        ("optimizer.type=Lamb", "deepspeed.config="),
        ("zero_optimization.offload_param.pin_memory=false", "add zero.offload=all"),
        ("zero_optimization.offload_optimizer.pin_memory=false", "add zero.offload=optimizer"),
    ],
)
def test_an_option_is_only_what_deepspeed_takes_unchanged(word: str, sentence: str) -> None:
    with pytest.raises(Refusal) as caught:
        load(compose(["mode=train", f"deepspeed.options.{word}"]))
    assert str(caught.value).startswith("deepspeed.options.")
    assert sentence in str(caught.value)


def test_without_a_file_nothing_changes() -> None:
    words = ["mode=train", "deepspeed.config=null", "zero=2"]
    assert expanded(words).arguments == words
    assert expanded(words).reasons(Settings()) == {}
