"""The full state of a training run on disk: everything that the next step depends on, without pickles.

A checkpoint is a directory `step-00000010` with one safetensors file for each rank, and a manifest with the name, size
and digest of each file, and a digest of its own. It is written under a temporary name and then renamed, so it is either
complete or absent.
"""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from harness.config.load import Refusal
from harness.config.rules.sources import run_state
from harness.ledger.owners import auxiliary_tensors
from harness.ledger.traffic import READ, WRITE
from harness.runtime import faults
from harness.runtime.files import NotWritten, digest, flush, folder, move, part_of, writing
from harness.runtime.world import World
from harness.training.engine import Engine
from harness.training.optimizers import load_state, state_of
from harness.training.pipeline_engine import Pipeline

T = TypeVar("T")

SCHEMA = "harness.checkpoint/1"

FLAT_MASTERS = (
    "fp32_partitioned_groups_flat",  # ZeRO-3
    "single_partition_of_fp32_groups",  # ZeRO-1 and 2
    "fp32_groups_flat_partition",  # BF16_Optimizer
)
"""The attributes in which DeepSpeed's optimizers keep flat fp32 master weights."""


def masters(engine: Engine | Pipeline) -> list[torch.Tensor]:
    """This rank's fp32 master weights in the optimizer's order; the parameters themselves where there
    are no masters.
    """
    wrapper = engine.deepspeed.optimizer
    if wrapper is engine.inner:
        return [parameter for group in engine.inner.param_groups for parameter in group["params"]]
    for attribute in FLAT_MASTERS:
        if hasattr(wrapper, attribute):
            return list(getattr(wrapper, attribute))
    return [parameter for group in wrapper.fp32_groups for parameter in group]


def tensors(engine: Engine | Pipeline) -> dict[str, torch.Tensor]:
    """Every tensor of this rank that the next step depends on, by name: weights, masters, optimizer state."""
    named = {}
    for name, parameter in engine.module.named_parameters():
        named[f"weights/{name}"] = getattr(parameter, "ds_tensor", parameter).data
    named |= {f"weights/{name}": tensor for name, tensor in _scales(engine.module)}
    for index, master in enumerate(masters(engine)):
        if engine.deepspeed.optimizer is not engine.inner:
            named[f"masters/{index}"] = master.data
        for key, value in state_of(engine.inner, master).items():
            named[f"optimizer/{index}/{key}"] = value
    return named


def _scales(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What layers with packed weights have beside them, by name."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, holder, attribute in auxiliary_tensors(module):
            tensor = holder[attribute]
            if id(tensor) not in seen:  # a layer and its weight may refer to the same ones
                seen.add(id(tensor))
                yield f"{name}.{key}", tensor


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(device)
    return state


class NotFinite(FloatingPointError):
    """Weights of `rank` are not finite: a run that went on from them could not be repaired."""

    def __init__(self, rank: int, name: str) -> None:
        super().__init__(f"{name} is not finite after the update; no state of it is saved")
        self.rank = rank


def save(
    engine: Engine | Pipeline,
    world: World,
    directory: Path,
    step: int,
    identity: Mapping[str, Any],
    keep: int,
    write: bool = True,
) -> Path:
    """Write the state after `step` steps under `directory`, then delete all but the newest `keep` checkpoints.
    Collective.

    Without `write` it allocates the same memory and writes nothing. Raises NotWritten, on every rank, where any of them
    cannot write its part, and NotFinite, unless `train.nonfinite=ignore`: then nothing of the checkpoint is left, and
    the older ones are as they were.
    """
    final = directory / f"step-{step:08d}"
    partial = world.broadcast(part_of(final))
    file = partial / f"rank-{world.rank:05d}.safetensors"
    state = {**tensors(engine), **_random_state(world.device)}
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    if engine.settings.train.nonfinite != "ignore":
        with engine.ledger.uncounted():
            _check_finite(state, world, write)
    try:
        _on_all(world, lambda: _begin(partial) if world.leads and write else None)
        entries = _on_all(world, lambda: _write_rank(state, file, step) if write else {})
        engine.ledger.traffic.report(WRITE, {name: tensor.nbytes for name, tensor in state.items()})
        manifest = {"schema": SCHEMA, "step": step, "identity": {**identity}, "files": entries}
        manifest["sha256"] = _digest_of(manifest)
        _on_all(world, lambda: _complete(partial, final, manifest, keep) if world.leads and write else None)
    except NotWritten:
        if world.leads:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _check_finite(state: Mapping[str, torch.Tensor], world: World, read: bool) -> None:
    """Raise NotFinite, on every rank, where a weight in the `state` of any of them is not finite.

    Without `read` it allocates the same memory and looks at no value.
    """
    spoiled = None
    for name, tensor in state.items():
        if name.startswith(("weights/", "masters/")) and tensor.is_floating_point() and tensor.numel():
            ends = tensor.aminmax()  # needs no memory, unlike isfinite; a NaN is both ends
            if read and not all(math.isfinite(float(end)) for end in ends):
                spoiled = spoiled or name
    for rank, found in enumerate(world.gather(spoiled)):
        if found is not None:
            raise NotFinite(rank, found)


def _on_all(world: World, act: Callable[[], T]) -> list[T]:
    """What `act` returns on each rank, in rank order. Raises NotWritten on every rank where any of them does."""
    outcome: T | NotWritten
    try:
        outcome = act()
    except NotWritten as error:
        outcome = error
    outcomes = world.gather(outcome)
    for each in outcomes:
        if isinstance(each, NotWritten):
            raise each
    return cast(list[T], outcomes)


def _begin(partial: Path) -> None:
    folder(partial.parent)
    folder(partial)


def _complete(partial: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    """Write the manifest, give the checkpoint its name, and delete those before the newest `keep`."""
    file, text = partial / "manifest.json", json.dumps(manifest)
    with writing(file, len(text)):
        faults.at("write manifest.json", manifest["step"])
        file.write_text(text)
        flush(file)
        move(partial, final)
    for old in _by_step(final.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _write_rank(state: dict[str, torch.Tensor], file: Path, step: int) -> dict[str, Any]:
    """Write `state` and the random state of the host's libraries; return this rank's entry in the manifest."""
    nbytes = sum(tensor.nbytes for tensor in state.values())
    with writing(file, nbytes):
        faults.at("write state", step)
        save_file(state, file)
        flush(file)
        written = {"name": file.name, "bytes": file.stat().st_size, "sha256": digest(file)}
    python_state = random.getstate()
    host = {"python": [python_state[0], list(python_state[1]), python_state[2]], "numpy": _numpy_state()}
    return {**written, "host": host}


def check_free(run: Path) -> None:
    """Raise Refusal for a run's directory in which another run has left its checkpoints."""
    if any((run / "state").glob("step-*")):
        remedy = "its state/ has the checkpoints of another run; move that away, or name another directory"
        raise Refusal("hydra.run.dir", run, remedy)


def newest_whole(directory: Path, key: str = "train.resume") -> tuple[Path, dict[str, Any], list[str]]:
    """The newest complete checkpoint in a run's directory, its manifest, and the reasons why newer ones were skipped.

    Raises Refusal where there is none.
    """
    skipped: list[str] = []
    for candidate in reversed(_by_step(run_state(directory))):
        try:
            return candidate, _verified_manifest(candidate), skipped
        except (OSError, ValueError, KeyError, TypeError) as reason:
            skipped.append(f"{candidate.name} is corrupt: {reason}")
    problems = "; ".join(skipped) or "it has no step-* directory; train with train.save_every=N to make them"
    raise Refusal(key, directory, f"there is no complete checkpoint: {problems}")


def _by_step(directory: Path) -> list[Path]:
    """The checkpoints in `directory` by the step in their names, never by time."""
    return sorted(directory.glob("step-*"), key=lambda each: (len(each.name), each.name))


def _verified_manifest(candidate: Path) -> dict[str, Any]:
    manifest = json.loads((candidate / "manifest.json").read_text())
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"its schema is {manifest['schema']}, and this version reads {SCHEMA}")
    if "sha256" in manifest and manifest.pop("sha256") != _digest_of(manifest):
        raise ValueError("manifest.json differs from what was written")
    if candidate.name != f"step-{manifest['step']:08d}":
        raise ValueError(f"its manifest is of step {manifest['step']}")
    for entry in manifest["files"]:
        file = candidate / entry["name"]
        if (
            file.parent != candidate
            or file.stat().st_size != entry["bytes"]
            or digest(file) != entry["sha256"]
        ):
            raise ValueError(f"{entry['name']} differs from what was written")
    return manifest  # type: ignore[no-any-return]


def load(
    engine: Engine | Pipeline,
    world: World,
    checkpoint: Path,
    manifest: dict[str, Any],
) -> int:
    """Load the state in place and return the number of completed steps. The checkpoint must be of this run."""
    entry = manifest["files"][world.rank]
    state = load_file(checkpoint / entry["name"])
    engine.ledger.traffic.report(READ, {name: tensor.nbytes for name, tensor in state.items()})
    live = tensors(engine)
    for name in [name for name in live if not name.startswith("optimizer/")]:
        live[name].copy_(state[name])
    resident = getattr(engine.deepspeed.optimizer, "persistent_parameters", [])
    if resident:  # ZeRO-3 keeps small parameters gathered: copy the loaded shards to them
        resident[0].partition(resident)
        resident[0].all_gather(resident)
    for index, master in enumerate(masters(engine)):
        prefix = f"optimizer/{index}/"
        optimizer_state = {
            name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
        }
        if optimizer_state:
            load_state(engine.inner, master, optimizer_state)
    torch.set_rng_state(state["random/cpu"])
    if "random/cuda" in state and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["random/cuda"], world.device)
    version, state_values, gauss = entry["host"]["python"]
    random.setstate((version, tuple(state_values), gauss))
    name, keys, *rest = entry["host"]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    return int(manifest["step"])


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), *rest]


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
