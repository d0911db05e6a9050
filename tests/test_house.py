"""The rooms of `harness/`: what each may import, by the import statements themselves."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from harness.__main__ import EXTRAS

HARNESS = Path(__file__).parents[1] / "harness"

ROOMS = (
    *(
        "tables",
        "config",
        "ledger",
        "device",
        "runtime",
        "record",
        "data",
        "quantization",
        "model",
        "training",
        "generation",
    ),
    *("rehearsal", "analysis", "__init__", "advice", "check", "report", "run", "pytest_plugin", "__main__"),
)
"""From the bottom up: a room imports what stands before it."""

WITHOUT_TORCH = (
    "config",
    "analysis",
    "check",
    "advice.explain",
    "device.outside",
    "record.schema",
    "record.record_file",
    "record.ceilings",
    "record.verified",
    "record.phase_times",
    "tables",
    "device.allocator_settings",
    "device.blocks",
    "device.caching_allocator",
    "device.expandable_segments",
    "device.replay",
    "device.snapshot",
)


def imports() -> Iterator[tuple[str, str, str]]:
    """Of each import of the harness's own: the file, its room, and the room that it imports."""
    for file in sorted(HARNESS.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "harness":
                inside = str(node.module).split(".")[1:]
                for name in inside[:1] or [each.name for each in node.names]:
                    yield (
                        str(file.relative_to(HARNESS)),
                        file.relative_to(HARNESS).parts[0].removesuffix(".py"),
                        name,
                    )


def test_there_are_no_more_rooms_than_a_newcomer_can_learn() -> None:
    rooms = {
        file.stem for file in HARNESS.iterdir() if file.suffix == ".py" or (file / "__init__.py").exists()
    }
    assert rooms == set(ROOMS)
    assert len(ROOMS) <= 20


def test_a_room_imports_only_those_below_it() -> None:
    face = {"Ledger": "ledger", "save": "record", "read": "record", "show": "analysis", "compare": "analysis"}
    actual = [
        (file, room, face.get(name, name if name in ROOMS else "__init__")) for file, room, name in imports()
    ]
    assert len(actual) > 500
    upward = [
        f"{file} imports {other}" for file, room, other in actual if ROOMS.index(other) > ROOMS.index(room)
    ]
    assert upward == []


def test_training_and_generation_do_not_know_each_other() -> None:
    assert {(room, name) for _, room, name in imports()}.isdisjoint(
        {("training", "generation"), ("generation", "training"), ("model", "rehearsal")}
    )


def modules_of(room: str) -> list[str]:
    """Every module in a room of the harness, or the one that has this name."""
    folder = HARNESS / room
    inside = folder.rglob("*.py") if folder.is_dir() else []
    names = (file.relative_to(HARNESS).with_suffix("").parts for file in inside if file.stem != "__init__")
    return [f"harness.{room}", *(".".join(("harness", *parts)) for parts in names)]


def fails_without(absent: Sequence[str], modules: Sequence[str]) -> str:
    """What Python says where `modules` are imported and the packages `absent` are not installed; "" if all is well."""
    lines = [f"import sys; sys.modules.update(dict.fromkeys({[*absent]!r}))", f"import {', '.join(modules)}"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    return done.stderr[-500:]


@pytest.mark.parametrize(
    ("rooms", "absent"),
    [
        (WITHOUT_TORCH, ("torch", *EXTRAS["run"], *EXTRAS["report"])),
        (("report",), ("torch", *EXTRAS["run"])),
        (("__main__", "ledger", "record", "pytest_plugin", "check"), (*EXTRAS["run"], *EXTRAS["report"])),
    ],
    ids=["tools", "report", "the bare package"],
)
def test_a_room_needs_no_more_than_it_is_installed_with(rooms: Sequence[str], absent: Sequence[str]) -> None:
    modules = [module for room in rooms for module in modules_of(room)]
    asks_the_ledger = {"harness.check.budget"} if "torch" in absent else set()
    assert not fails_without(absent, [module for module in modules if module not in asks_the_ledger])


def test_the_extras_are_those_of_the_project_s_own_file() -> None:
    with (HARNESS.parent / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    named = {
        re.split("[><=]", line)[0].lower().replace("-", "_")
        for line in project["optional-dependencies"]["run"]
    }
    assert named == {*EXTRAS["run"], *EXTRAS["report"]}


def test_each_room_says_what_lives_there_what_it_may_import_and_where_to_start() -> None:
    for folder in sorted(HARNESS.iterdir()):
        if (folder / "__init__.py").exists():
            head = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
            assert "import" in head, folder.name
            assert re.search(r"[Ss]tart (reading )?at", head), folder.name
