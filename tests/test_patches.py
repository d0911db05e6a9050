"""What is replaced in other packages: all of it by patches in one list, which fit what is installed."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.ledger.patch import Patch, arguments
from harness.ledger.patch_table import GROUP
from harness.rehearsal.cuda_shims import STAND_IN
from harness.rehearsal.every_patch import every_patch

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "transformers", "deepspeed", "accelerate")
EVERY = {f"{number} {patch.name}": patch for number, patch in enumerate(every_patch())}


@pytest.mark.parametrize("patch", EVERY.values(), ids=EVERY)
def test_a_patch_has_a_reason_and_the_releases_that_the_tests_run_on(patch: Patch) -> None:
    assert len(patch.reason.split()) > 2
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(rf"(?m)^{patch.package}==(\S+)", constraints)
    assert patch.checked
    if patch.package != "python":
        assert pinned
        assert pinned[1].startswith(tuple(f"{each}." for each in patch.checked) + patch.checked)


@pytest.mark.parametrize("patch", EVERY.values(), ids=EVERY)
def test_a_patch_finds_its_original_and_says_whether_its_arguments_are_compared(patch: Patch) -> None:
    place = patch.place()
    names = place if isinstance(place, dict) else vars(place)
    if patch.optional and patch.attribute not in names:
        return
    original = place[patch.attribute] if isinstance(place, dict) else getattr(place, patch.attribute)
    assert patch.unchecked or arguments(original) is not None


def test_every_patch_that_is_written_down_is_in_the_list() -> None:
    written = [
        node
        for file in sorted((ROOT / "harness").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Patch"
    ]
    several = (
        [patch for patch in EVERY.values() if patch.owner == "deepspeed.utils.groups"],
        [patch for patch in EVERY.values() if patch.reason == STAND_IN],
        [patch for patch in EVERY.values() if patch.owner == GROUP and patch.replacement is None],
        [patch for patch in EVERY.values() if patch.owner == GROUP and patch.replacement is not None],
    )
    assert len(written) == len(EVERY) - sum(map(len, several)) + len(several)  # one for all of each


# Nothing is replaced but by a patch


def root_of(node: ast.AST) -> str:
    """The name that an expression like `a.b.c`, `a.b["c"]` or `vars(a.b)` begins with; "" for another."""
    while True:
        if isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "vars"
            and node.args
        ):
            node = node.args[0]
        else:
            return node.id if isinstance(node, ast.Name) else ""


def names_of_libraries(tree: ast.AST) -> set[str]:
    """The names in a file that are modules, classes or functions of the libraries, or assigned from one."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in LIBRARIES:
                    names.add(alias.asname or alias.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in LIBRARIES:
            names.update(alias.asname or alias.name for alias in node.names)
    for _ in range(3):  # a name of a name of a name
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and _is_of(node.value, names):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def _is_of(value: ast.AST | None, names: set[str]) -> bool:
    """Whether an expression is a module or class of the libraries, or an attribute of one."""
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "import_module" and value.args:
        name = value.args[0]
        return isinstance(name, ast.Constant) and str(name.value).partition(".")[0] in LIBRARIES
    return isinstance(value, ast.Attribute | ast.Name) and root_of(value) in names


def replacements(source: str) -> Iterator[str]:
    """The lines that set or delete an attribute, or an entry of a table, of a module or class of the libraries."""
    tree = ast.parse(source)
    names, lines = names_of_libraries(tree), source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if root_of(node) in names:
                yield lines[node.lineno - 1].strip()
        elif isinstance(node, ast.Call):
            function = node.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            sets = name in ("setattr", "delattr", "__setattr__", "__delattr__", "setitem")
            if sets and node.args and root_of(node.args[0]) in names:
                yield lines[node.lineno - 1].strip()
            changes = name in ("update", "setdefault", "pop", "clear") and isinstance(function, ast.Attribute)
            if changes and isinstance(function, ast.Attribute) and _is_namespace(function.value, names):
                yield lines[node.lineno - 1].strip()


def _is_namespace(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is `vars(a.b)` or `a.b.__dict__` of the libraries."""
    called = isinstance(node, ast.Call) or getattr(node, "attr", "") == "__dict__"
    return called and root_of(node) in names


def test_nothing_of_a_library_is_set_but_by_a_patch() -> None:
    files = [file for file in sorted((ROOT / "harness").rglob("*.py")) if file.name != "patch.py"]
    assert len(files) > 100
    set_here = [
        f"{file.name}: {line}" for file in files for line in replacements(file.read_text(encoding="utf-8"))
    ]
    assert set_here == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.tensor = None",
        "import torch.nn as nn\nnn.Module._apply = None",
        "from torch.utils import checkpoint\ncheckpoint.hook, other = 1, 2",
        "def f():\n    from transformers import Cache\n    setattr(Cache, 'update', None)",
        "import deepspeed\ndeepspeed.ops.__compatible_ops__['x'] = False",
        "import torch\nsame: object = torch.utils.checkpoint\nsame.hook = None",
        "import torch\nvars(torch)['tensor'] = None",
        "import torch\nvars(torch.nn.functional).update(linear=None)",
        "import torch\ntorch.__dict__.update(tensor=None)",
        "import torch\nwith open('x') as torch.tensor: pass",
        "import torch\ndel torch.tensor",
        "from importlib import import_module\nx = import_module('accelerate.state')\nx.PartialState = None",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert len([*replacements(source)]) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nself.x = torch.ones(1)",
        "import torch\nx = torch.ones(1)\nx.data = x",
        "from transformers import Cache\nlayer = Cache().layers\nlayer.keys = 1",
    ],
)
def test_the_search_leaves_out_what_is_one_s_own(source: str) -> None:
    assert [*replacements(source)] == []


# What does not fit ends a run with a sentence

BROKEN = """
import sys
from dataclasses import replace
from harness.training import engine
from harness.__main__ import main
name = "deepspeed.ops.__compatible_ops__.deepspeed_shm_comm"
engine.PATCHES[name] = replace(engine.PATCHES[name], attribute="_gone", optional=False)
sys.exit(main(sys.argv[1:]))
"""


ON_A_GPU = """
import deepspeed
from harness.ledger.patch import install
from harness.training import engine
assert deepspeed.accelerator.get_accelerator().device_name() == "cuda"
for patch in engine.PATCHES.values():
    install(patch.by(lambda original: False))
"""


def test_the_engine_s_patches_fit_where_deepspeed_is_for_gpus() -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    subprocess.run([sys.executable, "-c", ON_A_GPU], env=environment, check=True, timeout=240)


def test_a_run_whose_engine_does_not_fit_ends_with_the_patch_by_name(tmp_path: Path) -> None:
    words = ("mode=train", "train.steps=1", "train.sequence=16", f"hydra.run.dir={tmp_path}/out")
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=240,
    )
    assert done.returncode == 3
    assert "deepspeed.ops.__compatible_ops__._gone is replaced because DeepSpeed would compile" in done.stderr
    assert "it is not there" in done.stderr
    assert "Traceback" not in done.stderr
