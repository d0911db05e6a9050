"""The package as others get it: light to import, and whole in a wheel."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from harness.config import compose

ROOT = Path(__file__).parents[1]


def test_importing_the_package_and_its_settings_imports_no_torch() -> None:
    code = "import sys, harness, harness.config.load, harness.config.compose; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True
    )
    assert result.stdout == "False\n"


def test_what_programs_need_are_the_package_s_own_names() -> None:
    import harness
    from harness.analysis import compare, summary
    from harness.ledger import ledger
    from harness.record import record_file, save

    assert harness.Ledger is ledger.Ledger
    assert harness.save is save.save
    assert harness.read is record_file.read
    assert harness.show is summary.show
    assert harness.compare is compare.compare
    with pytest.raises(AttributeError, match="no attribute 'Leger'"):
        harness.Leger  # noqa: B018


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout."""
    where = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build; hatchling.build.build_wheel({str(where)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    (built,) = where.glob("*.whl")
    return built


def test_a_wheel_holds_every_page_of_conf(wheel: Path) -> None:
    pages = {f"harness/conf/{each.relative_to(ROOT / 'conf')}" for each in (ROOT / "conf").rglob("*.yaml")}
    assert pages <= set(zipfile.ZipFile(wheel).namelist())


def test_a_wheel_holds_what_was_verified(wheel: Path) -> None:
    files = {f"harness/verified/{each.name}" for each in (ROOT / "profiles" / "verified").iterdir()}
    assert files
    assert files <= set(zipfile.ZipFile(wheel).namelist())


def test_an_installed_wheel_composes_its_own_config_away_from_the_checkout(
    wheel: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import sys, harness.config.compose as config, harness.__main__ as door; print(config.directory());"
        "sys.exit(door.main(['--cfg', 'job', 'model=small']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    )
    assert result.stdout.startswith(f"{site}/harness/conf\n")
    assert "name: small" in result.stdout


def test_the_wheel_has_the_efficiencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert "harness/analysis/speed/efficiency.json" in archive.namelist()


def test_the_console_script_is_the_door_and_pytest_finds_its_plugin(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        reported = archive.read(entry_points).decode()
    assert "[console_scripts]\nharness = harness.__main__:console\n" in reported
    assert "[pytest11]\nharness = harness.pytest_plugin\n" in reported


def test_every_requirement_has_an_exact_version_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        each for extra in project["optional-dependencies"].values() for each in extra
    ]
    pinned = {
        line.partition("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert {each.partition(">=")[0] for each in wanted} <= {each.replace("_", "-") for each in pinned}


def test_the_checkout_reads_the_pages_beside_the_package() -> None:
    assert compose.directory() == ROOT / "conf"


def test_an_environment_gets_all_that_is_asked_for_but_torch_itself() -> None:
    launcher = (ROOT / "launch/environment").read_text()
    function = launcher[launcher.index("requirements() {") : launcher.index("\n# Whether all of $1")]
    command = ["bash", "-c", f"{function}\nrequirements run test dev"]
    said = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        each for extra in ("run", "test", "dev") for each in project["optional-dependencies"][extra]
    ]
    assert {*said.split("\n")[:-1]} == {each for each in wanted if Requirement(each).name != "torch"}
    assert any(line.startswith("torchao") for line in said.splitlines())
