"""The rooms of `harness/`: what each may import, by the import statements themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "harness"

ROOMS = (
    *(
        "tables",
        "config",
        "ledger",
        "runtime",
        "record",
        "data",
        "quantization",
        "model",
        "training",
        "generation",
    ),
    *("rehearsal", "analysis", "advice", "check", "report", "run", "pytest_plugin", "__main__", "__init__"),
)
"""From the bottom up: a room imports what stands before it."""

WITHOUT_TORCH = (
    "config",
    "analysis",
    "report",
    "check",
    "advice.explain",
    "record.schema",
    "record.record_file",
    "tables",
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
    found = [(file, room, face.get(name, name)) for file, room, name in imports()]
    assert len(found) > 500
    upward = [
        f"{file} imports {other}" for file, room, other in found if ROOMS.index(other) > ROOMS.index(room)
    ]
    assert upward == []


def test_training_and_generation_do_not_know_each_other() -> None:
    assert {(room, name) for _, room, name in imports()}.isdisjoint(
        {("training", "generation"), ("generation", "training"), ("model", "rehearsal")}
    )


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_a_room_that_reads_needs_no_torch(room: str) -> None:
    folder = HARNESS / room
    names = [f"harness.{room}"]
    if folder.is_dir():
        names += [
            "harness." + ".".join(file.relative_to(HARNESS).with_suffix("").parts)
            for file in folder.rglob("*.py")
            if file.stem not in ("__init__", "budget")
        ]
    code = f"import sys; sys.modules['torch'] = None; import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_each_room_says_what_lives_there_what_it_may_import_and_where_to_start() -> None:
    for folder in sorted(HARNESS.iterdir()):
        if (folder / "__init__.py").exists():
            head = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
            assert "import" in head, folder.name
            assert "tart at" in head, folder.name
