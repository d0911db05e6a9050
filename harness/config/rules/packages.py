"""Which optional packages are installed, found out without importing one."""

from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from harness.config.settings import Refusal


def is_installed(package: str) -> bool:
    """Whether `package` can be imported. A folder of that name, as wandb/ of a run, is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


@cache
def version(package: str) -> str:
    """The installed version of `package`. It does not change in a process, and is long to read."""
    return metadata.version(package)


def check(key: str, value: Any, package: str, extra: str, instead: str = "") -> None:
    """Refuse `value` of `key` where the `package` that it needs, which `extra` of pyproject.toml brings, is missing."""
    if not is_installed(package):
        remedy = f"{package} is not installed; install it with pip install 'harness[{extra}]'{instead}"
        raise Refusal(key, value, remedy)
