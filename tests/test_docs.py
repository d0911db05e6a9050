"""What a page shows is what somebody who follows it sees; the pages that need torchrun are in distributed/."""

import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.__main__ import TOOLS
from tests.pages import DOCS, ROOT, blocks, code, commands, follow, inside, typed

PAGES = sorted(page.stem for page in DOCS.glob("*.md"))
RECIPES = ("plain-loop", "trainer", "accelerate", "deepspeed", "github-actions")
FOLLOWED = ("plain-loop", "trainer", "accelerate")
"""One after another, in one directory: each is held against the first."""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What each page's commands print."""
    directory = tmp_path_factory.mktemp("reader")
    typed_once, *others = FOLLOWED
    said = {typed_once: follow(typed_once, directory)}
    return said | {page: follow(page, directory, inside) for page in others}


@pytest.mark.parametrize("page", FOLLOWED)
def test_the_code_of_a_page_prints_what_the_page_shows(
    page: str, followed: dict[str, dict[str, str]]
) -> None:
    (shown,) = blocks(page, "text")
    assert shown in next(iter(followed[page].values()))


@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_ends_with_a_comparison_that_works(page: str, followed: dict[str, dict[str, str]]) -> None:
    (compared,) = (
        said for line, said in followed[page].items() if line.startswith("python -m harness compare")
    )
    assert "At its peak" in compared
    assert re.search(r"^  unattributed +0 B", compared, re.MULTILINE)


def test_a_rehearsed_program_prints_what_its_page_shows(tmp_path: Path) -> None:
    (shown,) = blocks("rehearse-program", "text")
    (printed,) = follow("rehearse-program", tmp_path).values()
    assert printed == shown


def test_a_deepspeed_config_becomes_what_its_page_shows(tmp_path: Path) -> None:
    (tree,) = blocks("deepspeed-config", "json")
    (tmp_path / "ds_config.json").write_text(tree)
    rehearsed, shown, again = (inside(line, tmp_path) for line in commands("deepspeed-config"))
    (text,) = blocks("deepspeed-config", "text")
    assert rehearsed.startswith(text)
    (peak,) = re.findall(r"^  total .*$", rehearsed, re.MULTILINE)
    assert peak in again
    assert json.loads((tmp_path / "runs/three/deepspeed.json").read_text())["train_batch_size"] == 16
    assert "reduce_bucket_size: 50000" in shown


def test_a_gpu_s_budget_fails_as_its_page_shows(tmp_path: Path) -> None:
    (shown,) = blocks("gpu-budget", "text")
    code("gpu-budget", tmp_path)
    (line,) = commands("gpu-budget")
    printed = typed(f"{line} -p no:cacheprovider || test $? = 1", tmp_path)
    assert shown in printed
    assert "1 failed, 1 passed" in printed


def test_the_commands_of_a_sweep_s_page_do_what_it_says(tmp_path: Path) -> None:
    (primary,) = blocks("sweeps", "yaml")
    (tmp_path / "mine.yaml").write_text(primary)
    swept, compared, part, tree = (typed(line, tmp_path) for line in commands("sweeps"))
    assert "job 1 (zero=3): " in swept
    assert {"0", "1", "multirun.yaml"} == {each.name for each in (tmp_path / "zero").iterdir()}
    assert "At its peak" in compared
    assert part == "20\n"
    assert "model: small" in tree


@pytest.mark.parametrize("page", PAGES)
def test_every_tool_that_a_page_names_is_there(page: str) -> None:
    named = set(re.findall(r"python -m harness ([a-z]+)(?![\w=])", (DOCS / f"{page}.md").read_text()))
    assert named <= TOOLS.keys()
    assert page not in RECIPES or {"compare", "report"} <= named


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_found_from_the_readme(page: str) -> None:
    assert f"(docs/{page}.md)" in (ROOT / "README.md").read_text()


def test_every_promise_of_the_readme_is_a_test() -> None:
    named = re.findall(r"`(test_\w+)` \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The one job of the workflow."""
    (workflow,) = blocks("github-actions", "yaml")
    read = yaml.safe_load(workflow)
    assert read.keys() == {"name", True, "jobs"}  # YAML 1.1 takes `on` for a boolean, and GitHub does not
    (actual,) = read["jobs"].values()
    return actual  # type: ignore[no-any-return]


def test_the_workflow_is_a_job_of_steps_that_use_or_run(job: dict[str, Any]) -> None:
    assert job.keys() == {"runs-on", "timeout-minutes", "env", "steps"}
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert step.keys() <= {"name", "if", "with", "uses", "run"}
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/none@v0"))


def test_every_command_of_the_workflow_is_one_that_exists(job: dict[str, Any]) -> None:
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    assert lines
    for line in lines:
        command, *words = shlex.split(line)
        if command == ".":
            assert (ROOT / words[0]).is_file()
        else:
            assert shutil.which(command)
        if words[0] == "-m":
            assert find_spec(words[1])
        if words[:2] == ["-m", "harness"]:
            assert words[2] in TOOLS


def test_the_workflow_gates_and_keeps_what_the_gate_said(job: dict[str, Any]) -> None:
    run = "\n".join(step.get("run", "") for step in job["steps"])
    assert "check --all" in run
    (kept,) = (step["with"]["path"].split() for step in job["steps"] if "upload" in step.get("uses", ""))
    assert {Path(each) for each in re.findall(r"--junit (\S+)", run)} <= {Path(each) for each in kept}
    assert not any(step.get("continue-on-error") for step in job["steps"])


def test_the_page_s_loop_is_the_one_that_the_workflow_checks(job: dict[str, Any]) -> None:
    run = "\n".join(step.get("run", "") for step in job["steps"])
    assert commands("plain-loop")[0] in run.splitlines()
    assert '"runs/plain-loop"' in blocks("plain-loop", "python")[0]
