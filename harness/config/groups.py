"""The groups in `conf/` and their options, as the files there say. It imports nothing heavy."""

from pathlib import Path


def directory() -> Path:
    """`conf/`: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def groups() -> dict[str, list[str]]:
    """The options of each group: the names of the files in its folder."""
    folders = sorted(each for each in directory().iterdir() if each.is_dir())
    return {folder.name: sorted(each.stem for each in folder.glob("*.yaml")) for folder in folders}


def defaults() -> dict[str, str]:
    """The default option of each group."""
    import yaml

    listed = yaml.safe_load((directory() / "config.yaml").read_text())["defaults"]
    return {key: str(option) for each in listed if isinstance(each, dict) for key, option in each.items()}
