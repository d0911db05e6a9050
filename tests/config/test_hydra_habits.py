"""What Hydra composes, this composes; its flags and its keys do what they do there, or a sentence says why not."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from harness.__main__ import main
from harness.config import compose, hydra_keys
from harness.config.load import Refusal, load, without_hydra
from harness.config.refusal import Refusal as LightRefusal

MINE = """\
name: mine
config: {model_type: llama, vocab_size: 384, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
  num_attention_heads: 4, max_position_embeddings: 1024}
"""
SHORT = "# @package _global_\ndefaults: [{override /model: mine}, {override /zero: '3'}]\ntrain: {steps: 3}\n"
PRIMARY = "defaults: [config, {override model: mine}, _self_]\ntrain: {steps: 5}\n"

Own = Path
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def own(tmp_path: Path) -> Own:
    """A directory with an option of `model`, a group and a primary config of a user's own."""
    files = {"model/mine": MINE, "experiment/short": SHORT, "mine": PRIMARY, "fast/quick": "micro_batch: 2\n"}
    for name, text in files.items():
        file = tmp_path / "own" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "own"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Said]:
    """The exit code of `harness` with words, and what it prints."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    handlers, level = list(logging.root.handlers), logging.root.level
    yield run
    logging.root.handlers, logging.root.level = handlers, level  # --info adds one of Hydra's


def by_hydra(lines: Sequence[str], name: str = "config") -> Any:
    """What Hydra's own `compose` makes of `lines`, with our schema."""
    hydra_keys.make_ready(None)
    with initialize_config_dir(str(compose.directory()), version_base="1.3"):
        return OmegaConf.to_container(hydra_compose(name, list(lines)), resolve=True)


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "model=small zero='3' train.steps=7",
        "data=text data.path='a, b' seed=3 +model.config.attention_bias=true",
        "++train.steps=3 checkpointing=full checkpointing.layers=[0,1]",
        "~train.steps ~data",
        "~data=stdlib ~model.config.rope_parameters",
        "+model@train=small",
        "train.steps='${seed}' seed=4",
        "world=rehearsed world.size=8 hardware=h100-sxm ledger=exact",
        "model.config.rope_parameters={rope_type:default,rope_theta:5}",
        "hydra.job.name=mine hydra.verbose=true +hydra.job.env_set.A=3 model=gpt2",
        "hydra.searchpath=[file://{own}] model=mine",
        "hydra.searchpath=[file://{own}] +experiment=short",
        "hydra.searchpath=[file://{own}] +fast@train=quick",
    ],
)
def test_a_config_is_what_hydra_s_own_compose_makes_of_it(lines: str, own: Own) -> None:
    words = [
        word.replace("{own}", str(own)).replace("a,-b", "a, b")
        for word in lines.replace("a, b", "a,-b").split()
    ]
    ours = OmegaConf.to_container(without_hydra(compose.compose(words)), resolve=True)
    assert ours == by_hydra(words)


def test_a_directory_of_the_user_adds_options_groups_and_configs(own: Own, said: Said) -> None:
    assert (
        yaml.safe_load(said("--cfg", "job", "--config-dir", own, "model=mine")[1])["model"]["name"] == "mine"
    )
    experiment = yaml.safe_load(said("--cfg", "job", "-cd", own, "+experiment=short")[1])
    assert [
        experiment[key][name] for key, name in (("model", "name"), ("zero", "stage"), ("train", "steps"))
    ] == [
        "mine",
        3,
        3,
    ]
    for flag in ("--config-dir", "-cp"):
        primary = yaml.safe_load(said("--cfg", "job", flag, own, "--config-name=mine")[1])
        assert (primary["model"]["name"], primary["train"]["steps"], primary["data"]["kind"]) == (
            "mine",
            5,
            "stdlib",
        )
    assert said("--cfg", "job", f"--config-dir={own}", "model=nobody")[2] == (
        "harness: model=nobody: no such option; one of gpt2, llama2-70b, llama2-7b, llama3-405b, llama3-8b, mine, "
        "qwen3-8b, small, tiny\n"
    )


def test_flags_print_what_hydra_prints(own: Own, said: Said) -> None:
    code, printed, _ = said("--cfg", "hydra", "--package", "hydra.job", "--resolve")
    assert (code, yaml.safe_load(printed)["name"]) == (0, "harness")
    assert yaml.safe_load(said("--cfg", "all", "zero=2")[1])["zero"]["stage"] == 2
    assert said("--cfg", "job", "-p", "train.steps", "train.steps=7")[1] == "7\n"
    assert "seed: ${train.steps}" in said("--cfg", "job", "seed=${train.steps}")[1]
    assert "seed: 100" in said("--cfg", "job", "--resolve", "seed=${train.steps}")[1]
    assert f"command-line | file://{own}" in said("--info", "searchpath", "-cd", own)[1]
    assert "model/small" in said("--info", "defaults", "model=small")[1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("harness zero=", {"zero=0", "zero=1", "zero=2", "zero=3"}),
        ("harness train.ste", {"train.steps="}),
        ("harness mode=train zer", {"zero.", "zero="}),
        ("harness comp", {"compare"}),
        ("harness --config-d", {"--config-dir"}),
        ("harness compare ru", set()),
        ("harness --config-dir {own} model=mi", {"model=mine"}),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_completes_groups_keys_options_and_tools(
    shell: str, line: str, expected: set[str], own: Own, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = line.replace("{own}", str(own))
    monkeypatch.setenv("COMP_LINE", line)
    code, printed, error = said("-sc", f"query={shell}")
    assert (code, error) == (0, "")
    assert {word for word in printed.split() if word.startswith(line.split(" ")[-1])} == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str, said: Said) -> None:
    code, script, _ = said("--shell-completion", f"install={shell}")
    assert code == 0
    assert "harness" in script
    assert "-sc query=" in script


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--cfg", "--cfg: one of job, hydra, all"),
        ("--cfg jobs", "--cfg=jobs: no such value; one of job, hydra, all"),
        ("--info=everything", "--info=everything: no such value"),
        ("--config-dir", "--config-dir: give a value"),
        ("--config-dir /nowhere", "--config-dir=/nowhere: no such directory"),
        (
            "--config-name nobody",
            "--config-name=nobody: no such config; --config-dir adds a directory of yours",
        ),
        ("--multirun=3", "--multirun=3: it takes no value; leave it out"),
        ("-m --cfg job", "--multirun: not together with --cfg; leave one out"),
        ("--mulitrun", "--mulitrun: no such flag; did you mean --multirun?"),
        ("--shell-completion install=cmd", "No completion plugin for 'cmd' found"),
        ("--cfg job +nobody=mine", "nobody=mine: no such key"),
        ("--cfg job nobody@train=mine", "nobody=mine: "),
        ("zero=0,1", "zero=0,1: several values; add -m to run each"),
        ("zero=choice(0,1)", "zero=choice(0,1): several values; add -m to run each"),
        ("train.steps=range(1,3)", "train.steps=range(1,3): several values; add -m to run each"),
        ("hydra.sweep.dir=x", "hydra.sweep.dir=x: it has an effect in a sweep only; add -m"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib: it has an effect in a sweep only; add -m"),
        (
            "hydra.job.chdir=true",
            "hydra.job.chdir=true: relative paths are read from where the command is typed",
        ),
        ("hydra.output_subdir=x", "hydra.output_subdir=x: a run leaves config.yaml"),
        ("hydra.help.app_name=x", "hydra.help.app_name=x: of Hydra's own keys, only hydra.run.dir, "),
        ("hydra.mode=multirun", "hydra.mode=multirun: should be one of RUN, MULTIRUN"),
        ("hydra.run.dirr=x", "hydra.run.dirr=x: of Hydra's own keys, only "),
    ],
)
def test_what_cannot_be_right_is_one_sentence(words: str, sentence: str, said: Said) -> None:
    code, printed, error = said(*words.split(" "))
    assert (code, printed) == (2, "")
    assert error.startswith(f"harness: {sentence}")


def test_a_primary_config_that_sweeps_says_so(own: Own, said: Said) -> None:
    (own / "sweeping.yaml").write_text("defaults: [config, _self_]\nhydra: {mode: MULTIRUN}\n")
    assert (
        said("-cd", own, "-cn", "sweeping")[2]
        == "harness: hydra.mode=MULTIRUN: this config is a sweep; add -m\n"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"seed: [1\n", "line 2, column 1"),
        (b"seed: 1\nseed: 2\n", "found duplicate key seed"),
        (b"seed: \xff\n", "can't decode byte 0xff"),
        (b"defaults: {a: b}\n", "defaults must be a list"),
        (b"defaults: [config, override zero: 2]\n", "(an option that looks like a number needs quotes)"),
        (b"defaults: [config, wrong]\n", "does it take itself?"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_sentence(text: bytes, why: str, own: Own, said: Said) -> None:
    (own / "wrong.yaml").write_bytes(text)
    for words in (["--cfg", "job"], ["-m", "seed=1,2"]):
        code, printed, error = said(*words, "-cd", own, "-cn", "wrong")
        assert (code, printed, error.count("\n")) == (2, "", 1)
        assert error.startswith("harness: config=wrong: Hydra cannot read it, or a file that it takes: ")
        assert why in error


def test_hydra_s_keys_reach_a_run(tmp_path: Path) -> None:
    cfg = compose.compose(
        [
            "hydra.run.dir=~/x/${hydra.job.name}",
            "hydra.job.name=n",
            "+hydra.job.env_set.A=3",
            "hydra.output_subdir=null",
        ]
    )
    assert cfg.hydra.run.dir == f"{Path.home()}/x/n"
    assert cfg.hydra.job.env_set == {"A": "3"}
    assert compose.compose(
        ["data.path=${hydra:runtime.cwd}/a", "data=text"]
    ).data.path  # resolved where it is read


def test_a_directory_named_by_overrides_has_the_words_that_are_typed() -> None:
    words = ["model=small", "hardware=h100-sxm", "zero=2", "hydra.run.dir=${hydra.job.override_dirname}"]
    assert compose.compose(words).hydra.run.dir == "hardware=h100-sxm,model=small,zero='2'"


PATHS = (
    "model.path",
    "data.path",
    "data.cache_dir",
    "generation.prompts",
    "generation.workload",
    "train.resume",
)


@pytest.mark.parametrize("key", PATHS)
def test_a_tilde_is_the_home_directory_in_every_path(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "here"
    if key in ("generation.prompts", "generation.workload"):
        place.write_text('{"prompt": "a"}\n')
    else:
        place.mkdir()
        (place / "config.json").write_text('{"model_type": "llama"}')
    words = ["data=text"] if key == "data.path" else ["mode=infer"] if key.startswith("generation") else []
    group, _, name = key.partition(".")
    assert getattr(getattr(load(compose.compose([*words, f"{key}=~/here"])), group), name) == str(place)


def test_a_file_named_by_a_tilde_is_found_from_here(tmp_path: Path) -> None:
    (tmp_path / "~").write_text("text")
    with chdir(tmp_path):
        assert load(compose.compose(["data=text", "data.path=./~"])).data.path == "./~"
        with pytest.raises(Refusal, match="~nobody-here/a"):
            load(compose.compose(["data=text", "data.path=~nobody-here/a"]))
    assert os.path.expanduser("~root") == compose.compose(["hydra.run.dir=~root"]).hydra.run.dir


def test_a_refusal_is_one_class_wherever_it_is_imported_from() -> None:
    assert Refusal is LightRefusal
