"""The pages under `docs/`, as somebody who follows them would: their code in a file, their commands in a shell."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path

from harness.__main__ import TOOLS, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TORCHRUN = "torchrun --standalone --nproc-per-node 2"
REPORT = "python -m harness report"


def blocks(page: str, language: str) -> list[str]:
    """What stands in the page's blocks of `language`, in order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL
    )


def commands(page: str) -> list[str]:
    """The lines that the page has typed."""
    return "".join(blocks(page, "console")).splitlines()


def code(page: str, directory: Path) -> str:
    """The name of the file with the page's code, which is put in `directory`."""
    script = re.findall(r"\w+\.py", commands(page)[0])[0]
    (text,) = blocks(page, "python")
    (directory / script).write_text(text)
    return str(script)


def typed(line: str, directory: Path) -> str:
    """What `line` prints, in `directory`; it must end well."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        line,
        shell=True,
        cwd=directory,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def inside(line: str, directory: Path) -> str:
    """What `line`, if it is one of the harness's tools, prints in this process; else what it does where it is typed."""
    command = "python -m harness "
    if not line.startswith(command):
        return typed(line, directory)
    with chdir(directory), redirect_stdout(StringIO()) as said:
        assert main(shlex.split(line.removeprefix(command))) == 0
    return said.getvalue()


def follow(page: str, directory: Path, run: Callable[[str, Path], str] = typed) -> dict[str, str]:
    """Type the page's commands in `directory`, its code being there; what each of them prints, as `run` has it.

    Tools that are not there are another test's.
    """
    code(page, directory)
    known = [line for line in commands(page) if not line.startswith(REPORT) or "report" in TOOLS]
    return {line: run(line, directory) for line in known}


def pinned(*packages: str) -> list[str]:
    """Each of the packages with its version in constraints.txt, as the pages under `profiles/` name them."""
    lines = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    return [f"{name} {lines[name]}" for name in packages]


def installed_as_pinned(*packages: str) -> bool:
    """Whether these are installed in the versions of constraints.txt, whatever was built into them."""
    return [f"{name} {version(name).partition('+')[0]}" for name in packages] == pinned(*packages)
