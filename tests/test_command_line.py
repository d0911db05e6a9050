"""The one door, through its own process: what it prints, where, and the exit code."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import harness
from harness.__main__ import TOOLS, main
from harness.config import compose
from harness.config.load import load
from harness.config.settings import described_fields

ROOT = Path(__file__).parents[1]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Door = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def door(tmp_path: Path) -> Door:
    """`python -m harness` with words, in an empty directory and without torchrun's environment but for `variables`."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        environment = {**kept, "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, "-m", "harness", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False
        )

    return run


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "harness", "--help"]
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["mode=train", "-m", "--help"]])
def test_help_lists_every_key_every_option_and_the_torchrun_line(door: Door, words: list[str]) -> None:
    result = door(*words)
    assert (result.returncode, result.stderr) == (0, "")
    assert "torchrun --standalone" in result.stdout
    for key in described_fields():
        assert f"  {key}=" in result.stdout
    for group, options in compose.groups().items():
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"  {group} "))
        assert [each.rstrip("*") for each in line.split()[1:]] == options


def test_help_names_only_tools_that_are_there(door: Door) -> None:
    tools = door("--help").stdout.partition("Tools\n")[2].partition("\n\n")[0].splitlines()
    assert tools
    for line in tools:
        assert callable(import_module(f"harness.{TOOLS[line.split()[0]][0]}").main)


def test_a_wrong_request_is_refused_before_torch_is_imported(door: Door, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = door("train.steps=0", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "harness: train.steps=0: should be greater than or equal to 1\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zero=7"], "harness: zero=7: no such option; one of 0, 1, 2, 3\n"),
        (["train.clip=(("], "harness: train.clip=((: cannot be read; "),
        (["compre"], "harness: compre: neither key=value nor a tool; did you mean compare?\n"),
        (["--halp"], "harness: --halp: no such flag; did you mean --help?\n"),
        (
            ["mode=train", "loud"],
            "harness: loud: neither key=value nor a tool; --help lists the keys and the tools\n",
        ),
        (["--cfg", "job", "zero=7"], "harness: zero=7: "),
    ],
)
def test_a_wrong_word_is_one_line_on_stderr_and_exit_code_2(door: Door, words: list[str], said: str) -> None:
    result = door(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


def test_a_world_that_torchrun_did_not_make_is_refused_with_the_line_to_type(
    door: Door, tmp_path: Path
) -> None:
    result = door("mode=train", "world.size=2", "hydra.run.dir=run")
    line = "torchrun --standalone --nproc-per-node 2 -m harness mode=train world.size=2 hydra.run.dir=run"
    assert result.returncode == 2
    assert result.stderr == f"harness: world.size=2: 1 rank here; start {line}\n"
    assert not (tmp_path / "run").exists()


def test_of_two_ranks_the_first_refuses_and_the_other_is_silent(door: Door) -> None:
    other = door("zero=7", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert (other.returncode, other.stdout, other.stderr) == (2, "", "")
    first = door("zero=7", RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert first.stderr.startswith("harness: zero=7")


def test_torchrun_s_report_ends_with_the_sentence(door: Door, tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    for rank in ("0", "1"):
        door("zero=7", RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, TORCHELASTIC_ERROR_FILE=str(file))
        report = str(ChildFailedError("harness", {int(rank): ProcessFailure(int(rank), 1, 2, str(file))}))
        assert report.splitlines()[-2] == "  traceback : harness: zero=7: no such option; one of 0, 1, 2, 3"
        file.unlink()


def test_the_config_can_be_printed_without_a_run(door: Door, tmp_path: Path) -> None:
    result = door("--cfg", "job", "zero=3", "train.steps=7")
    assert result.returncode == 0
    (tmp_path / "printed.yaml").write_text(result.stdout)
    printed = load(DictConfig(OmegaConf.load(tmp_path / "printed.yaml")))
    assert (printed.zero.stage, printed.train.steps, printed.model.name) == (3, 7, "tiny")
    assert [each.name for each in tmp_path.iterdir()] == ["printed.yaml"]


def test_the_version_is_the_package_s(door: Door) -> None:
    for words in (["--version"], ["mode=train", "--version"]):
        assert door(*words).stdout == f"harness {harness.__version__}\n"


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("transformers", ("mode=train", "world=rehearsed", "world.size=1"), "run"),
        ("deepspeed", ("mode=train", "world=rehearsed", "world.size=1"), "run"),
        ("plotly", ("report", "RUN", "-o", "PAGE"), "report"),
    ],
)
def test_a_package_that_an_extra_brings_is_named_with_it(
    package: str, arguments: tuple[str, ...], extra: str
) -> None:
    absent = f"import sys; sys.modules[{package!r}] = None"
    code = f"{absent}; from harness.__main__ import main; sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    said = f"harness: {package} is not installed; install it with pip install 'harness[{extra}]'"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, said)


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (("--version",), ("hydra", "omegaconf", "pydantic", "argparse")),
        (("--help",), ("hydra", "omegaconf", "tqdm", "numpy")),
        (
            ("compare", "RUN", "RUN"),
            ("hydra", "omegaconf", "yaml", "pyarrow", "tqdm", "harness.config.settings"),
        ),
        (("explain", "RUN", "--no-rehearsal"), ("hydra", "omegaconf", "yaml", "pyarrow", "tqdm")),
        (("roofline", "RUN"), ("hydra", "omegaconf", "yaml", "pyarrow", "tqdm")),
        (("traffic", "RUN"), ("hydra", "omegaconf", "yaml", "pyarrow", "tqdm")),
        (("links", "RUN"), ("hydra", "omegaconf", "pyarrow", "tqdm")),
        (("report", "RUN", "-o", "PAGE"), ("pandas",)),
        (("check", "RUN", "--baseline", "RUN.json", "--update"), ("hydra", "omegaconf", "pyarrow")),
    ],
    ids=lambda words: words[0],
)
def test_a_tool_imports_nothing_that_it_does_not_use(
    words: tuple[str, ...], absent: tuple[str, ...], tmp_path: Path, recorded: Path
) -> None:
    words = tuple(word.replace("RUN", str(recorded)).replace("PAGE", str(tmp_path)) for word in words)
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from harness.__main__ import main; main({words})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, rehearsed."""
    directory = tmp_path_factory.mktemp("recorded") / "run"
    words = (
        "mode=train",
        "world=rehearsed",
        "world.size=1",
        "train.steps=1",
        "train.sequence=16",
        "precision=fp32",
    )
    command = [sys.executable, "-m", "harness", *words, f"hydra.run.dir={directory}"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return directory


def test_an_unexpected_error_is_a_failed_run_in_one_sentence_that_names_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.analysis import compare

    def fail(words: object) -> int:
        raise KeyError("out of luck")

    monkeypatch.setattr(compare, "main", fail)
    assert main(["compare", "RUN", "RUN"]) == 3
    out, err = capsys.readouterr()
    said = re.fullmatch(r"harness: unexpected error: KeyError: 'out of luck' \(traceback in (.+)\)\n", err)
    assert (out, said is not None) == ("", True), err
    assert said is not None
    assert 'raise KeyError("out of luck")' in Path(said[1]).read_text()
    Path(said[1]).unlink()
