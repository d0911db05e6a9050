"""TensorBoard, W&B and MLflow: how each begins offline, in a run's directory, and how each ends a failed run.

accelerate's classes do the rest. They have no way to say that a run failed.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar

PROJECT = "harness"
"""The W&B project and the MLflow experiment, where the environment names none."""


class Tracker:
    """A run in one tracker, by accelerate's class for it. Every method may raise what the tracker's package raises."""

    environment: ClassVar[Mapping[str, str]] = {}
    """What the package finds in its environment where the user has not set it."""

    def __init__(self) -> None:
        self._tracker: Any = None
        self.place = ""  # where its figures are, and how to see them

    def start(self, name: str, directory: Path, settings: Mapping[str, bool | float | str]) -> None:
        """Begin a run of this `name`, in the run's `directory`, with `settings` as its hyperparameters."""
        from accelerate.state import PartialState

        PartialState()  # accelerate's logger needs one; the process group is the run's own
        for variable, value in self.environment.items():
            os.environ.setdefault(variable, value)
        self._tracker, self.place = self._made(name, directory)
        self._tracker.start()
        self._tracker.store_init_configuration(settings)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send the `figures` of `step`."""
        self._tracker.log(figures, step=step)

    def finish(self) -> None:
        """End the run."""
        self._tracker.finish()

    def fail(self, sentence: str, step: int) -> None:
        """End the run as failed, because of `sentence`, after `step`."""
        raise NotImplementedError

    def _made(self, name: str, directory: Path) -> tuple[Any, str]:
        """accelerate's tracker, and its place."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """It has no state of a run; a failure is a text. Its figures have 24 bits."""

    def _made(self, name: str, directory: Path) -> tuple[Any, str]:
        from accelerate.tracking import TensorBoardTracker

        place = directory / "tensorboard"
        return TensorBoardTracker(place.name, directory), f"tensorboard --logdir {quote(str(place))}"

    def fail(self, sentence: str, step: int) -> None:
        self._tracker.log({"failure": sentence}, step=step)
        self._tracker.finish()


class Wandb(Tracker):
    """`WANDB_MODE=online` sends it. Offline it would still report on itself to its maker."""

    environment: ClassVar[Mapping[str, str]] = {
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }

    def _made(self, name: str, directory: Path) -> tuple[Any, str]:
        from accelerate.tracking import WandBTracker

        variables = os.environ
        options = {
            "name": variables.get("WANDB_NAME", name),
            "dir": variables.get("WANDB_DIR", str(directory)),
            "settings": {"console": "off"},  # a wrapped stdout is no terminal, and has no bar
        }
        return WandBTracker(variables.get("WANDB_PROJECT", PROJECT), **options), ""

    def start(self, name: str, directory: Path, settings: Mapping[str, bool | float | str]) -> None:
        super().start(name, directory, settings)
        run = self._tracker.tracker
        self.place = run.url or (
            "off, by WANDB_MODE=disabled"
            if run.disabled
            else f"wandb sync {quote(str(Path(run.dir).parent))}"
        )

    def fail(self, sentence: str, step: int) -> None:
        self._tracker.tracker.summary["failure"] = sentence
        self._tracker.tracker.finish(exit_code=3)


class Mlflow(Tracker):
    """A SQLite file holds it unless `MLFLOW_TRACKING_URI` names a server. Its maker gets no telemetry."""

    environment: ClassVar[Mapping[str, str]] = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }

    def _made(self, name: str, directory: Path) -> tuple[Any, str]:
        import mlflow
        from accelerate.tracking import MLflowTracker

        where, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if where is None:
            where, artifacts = f"sqlite:///{directory / 'mlflow.db'}", (directory / "mlflow").as_uri()
            mlflow.set_tracking_uri(where)
        return (
            MLflowTracker(PROJECT, logging_dir=artifacts, run_name=name),
            f"mlflow ui --backend-store-uri {quote(where)}",
        )

    def fail(self, sentence: str, step: int) -> None:
        from mlflow import MlflowClient

        run, client = self._tracker.tracker.info.run_id, MlflowClient()
        client.set_tag(run, "failure", sentence)
        client.set_terminated(run, status="FAILED")  # mlflow.end_run knows only the runs of its own thread


KINDS: Mapping[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
