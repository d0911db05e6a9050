"""What trackers have of a run, by each one's own reader: figures by name and step, settings, and how the run ended."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

Figures = dict[str, dict[int, float]]


class Tracked(NamedTuple):
    """A run as a tracker has it."""

    figures: Figures
    settings: dict[str, str]
    state: str
    failure: str | None = None


def tensorboard(run: Path) -> Tracked:
    """TensorBoard's event files. It has no state of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    figures = {
        name: {each.step: each.value for each in events.Scalars(name)} for name in events.Tags()["scalars"]
    }
    texts = [events.Tensors(name)[-1].tensor_proto for name in events.Tags()["tensors"]]
    (written,) = run.glob("tensorboard/*/hparams.yml")
    lines = (line.partition(": ") for line in written.read_text().splitlines())
    failure = next((make_ndarray(each)[0].decode() for each in texts), None)
    return Tracked(figures, {key: value.strip("'") for key, _, value in lines}, "", failure)


def wandb(run: Path) -> Tracked:
    """The transaction log of W&B, as its own command reads it."""

    def inspected(*words: str) -> str:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", *words, "--json", str(run / "wandb")]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    summary = json.loads(inspected("--summary"))
    figures: Figures = {}
    for line in inspected().splitlines():
        record = json.loads(line)
        items = record["history"]["item"] if record["type"] == "history" else {}
        for name, value in items.items():
            if not name.startswith("_"):
                figures.setdefault(name, {})[int(items["_step"])] = value
    settings = {key: str(value) for key, value in summary["config"].items()}
    return Tracked(figures, settings, summary["state"], summary["summary"].get("failure"))


def mlflow(run: Path) -> Tracked:
    """The one run of MLflow's database."""
    from mlflow import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("harness")
    (found,) = client.search_runs([experiment.experiment_id])
    figures = {
        name: {point.step: point.value for point in client.get_metric_history(found.info.run_id, name)}
        for name in found.data.metrics
    }
    return Tracked(figures, found.data.params, found.info.status, found.data.tags.get("failure"))


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
