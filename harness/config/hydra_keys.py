"""Hydra's own keys: which of them have an effect here, and what else Hydra needs to find `conf/` and our schema."""

import dataclasses
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from harness.config.groups import directory
from harness.config.settings import Refusal, Settings

RUN_DIR = "hydra.run.dir"

OF_A_RUN = (
    RUN_DIR,
    "hydra.mode",
    "hydra.searchpath",
    "hydra.verbose",
    "hydra.output_subdir",
    "hydra.job.name",
    "hydra.job.num",
    "hydra.job.id",
    "hydra.job.chdir",
    "hydra.job.config",
    "hydra.job.env_set",
)
"""What has an effect in a run; the keys below these too."""

OF_A_SWEEP = (
    "hydra.sweep",
    "hydra.sweeper",
    "hydra.launcher",
    "hydra.callbacks",
    "hydra.job",
    "hydra.job_logging",
)
"""What has an effect in a sweep only."""

PLUGINS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}
"""Launchers that are packages of their own, and the extras that bring them."""


def check(key: str, value: Any, sweep: bool = False) -> None:
    """Raise Refusal where the override of Hydra's `key` cannot be right here, or would have no effect."""
    typed, key = key, key.replace("/", ".")
    if key == "hydra.job.chdir" and value:
        remedy = "relative paths are read from where the command is typed; leave it out"
        raise Refusal(typed, value, remedy)
    if sweep and key == RUN_DIR:
        raise Refusal(typed, value, "it has an effect in a single run; a sweep has hydra.sweep.dir=")
    if sweep:
        return
    if key == "hydra.output_subdir" and value is not None:
        raise Refusal(typed, value, "a run leaves config.yaml and record.json; leave it out, or add -m")
    if _below(key, OF_A_RUN):
        return
    if _below(key, OF_A_SWEEP) or key in ("hydra.hydra_logging",):
        raise Refusal(typed, value, "it has an effect in a sweep only; add -m, or leave it out")
    raise Refusal(
        key, value, f"of Hydra's own keys, only {', '.join(OF_A_RUN)} have an effect in a run; leave it out"
    )


def of_a_job(key: str) -> bool:
    """Whether a job of a sweep needs the sweep's override of Hydra's `key`; its environment has `env_set` already."""
    return _below(key, ("hydra.searchpath", "hydra.verbose", "hydra.job.name"))


def _below(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


class OurSearchPath(SearchPathPlugin):
    """Finds `conf/` after the primary config's directory, and then `--config-dir`, as Hydra's flag does."""

    config_dir: str | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra's hook."""
        ours = str(directory())
        if all(element.path.removeprefix("file://") != ours for element in search_path.get_path()):
            search_path.append("harness", f"file://{ours}")
        if self.config_dir is not None:
            search_path.append("command-line", f"file://{self.config_dir}")


def make_ready(config_dir: str | None) -> None:
    """Let Hydra find our schema and `conf/`, and `config_dir` after it."""
    ConfigStore.instance().store("schema", dataclasses.asdict(Settings()))
    OurSearchPath.config_dir = config_dir
    Plugins.instance().register(OurSearchPath)
