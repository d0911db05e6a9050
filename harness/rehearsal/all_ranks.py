"""A whole rehearsal: every role of a world, and one record of them all."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from harness.config.load import Refusal, Settings
from harness.config.rules.quantized import AT_FIRST, AT_LOAD
from harness.generation.generation_config import strategy_of
from harness.model.loader import model_config
from harness.model.resolve import resolve
from harness.record import record_file
from harness.rehearsal import UNVERIFIED, kernels
from harness.rehearsal.balance import Task, peak, resolved
from harness.rehearsal.pool import progress, workers
from harness.rehearsal.representatives import Role, roles
from harness.runtime.progress import Pace, aside

MEASURED = (
    *("kv_reserved", "kv_filled", "kv_live"),
    *("kv_pinned", "kv_state", "kv_host"),
)
"""Figures that `infer.largest` has of one rank's own layers."""


def described(settings: Settings) -> dict[str, Any]:
    """The record's `world`: what is rehearsed."""
    gpu = settings.hardware.device == "cuda"
    return {
        "kind": "rehearsed",
        "size": settings.world.size,
        "device": "cuda" if gpu else "cpu",
        "device_name": settings.hardware.name if settings.hardware.device != "auto" else None,
        "memory": settings.hardware.memory,
        "verified": UNVERIFIED if gpu else None,
        "differences": list(_differences(settings)),
    }


def _differences(settings: Settings) -> Iterator[str]:
    """What is known to differ from a real run of the same config, a sentence each."""
    if settings.model.path is not None and not settings.model.random:
        yield "weights are made and not read: while a real run reads them, in setup, it holds one parameter twice"
    if settings.mode == "infer" and settings.generation.stop_at_eos:
        yield "no sequence ends early: generation goes on to generation.max_new_tokens"
    if settings.mode == "infer" and _looks_up_ngrams(settings):
        yield "encoder_no_repeat_ngram_size forbids other tokens, and so a few bytes of numbers are more or fewer"
    if settings.mode == "infer" and settings.generation.compile:
        yield "the decoding step is not compiled: what its program needs beside the cache is its compiler's choice"
    if settings.hardware.device == "cuda" and (own := kernels.difference(settings)):
        yield own
    if settings.mode == "train" and settings.train.clip and settings.pipeline.stages > 1:
        yield "no gradient has a norm: where a real one is above train.clip, gradients may be moved once more"
    if settings.mode == "train":
        yield "no text is read: where a real run's data ends and begins anew, it has no next batch at hand"


def _looks_up_ngrams(settings: Settings) -> bool:
    """Whether a processor asks which tokens there are, and not only how many."""
    try:
        strategy = strategy_of(settings, model_config(settings.model))
    except Refusal:  # the rehearsal itself says it
        return False
    return "encoder_no_repeat_ngram_size" in strategy.processed


def of_packing(model: Mapping[str, Any]) -> Iterator[str]:
    """What differs where the weights of `model`, the record's, are packed."""
    packed = model.get("quantization")
    if packed is None or packed["whole"] == AT_LOAD:
        return
    yield (
        f"weights have the layout of {packed['method']}: what its kernels need beside them, or make of them to be "
        "faster, is not in these figures"
    )
    if packed["method"] == "mxfp4":
        yield "transformers computes in mxfp4 where triton and kernels are installed, and makes weights whole elsewhere"
    if packed["whole"] == AT_FIRST:
        yield "weights are made whole in one go: a real run holds a few copies of one layer meanwhile"


def rehearsed(settings: Settings, words: Sequence[str], parallel: bool = True) -> dict[str, Any]:
    """The record of a rehearsal that leaves nothing on disk; its roles at once where `parallel`.

    Raises Refusal as the run itself would, and whatever else the run raises.
    """
    decision = resolve(settings)
    ranks, done = rehearse(decision.settings, parallel=parallel)
    around = described(decision.settings)
    around["differences"] += of_packing(done["model"])
    head = record_file.head(decision.settings, decision.reasons, words, around)
    return {**head, "status": "complete", **done, "ranks": ranks}


def rehearse(
    settings: Settings, directory: Path | None = None, parallel: bool = True
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every role of `settings`' world: the records of the ranks that were rehearsed, and the run's parts.

    They leave their traces in `directory`, where one is given. Without `parallel` all of them are in this process, and
    silent: for a caller that has many such at once.

    Raises Refusal as the run itself would, RuntimeError where a shim does not fit, and whatever the run raises.
    """
    settings = balanced(settings) if parallel else resolved(settings)
    wanted = roles(settings)
    found: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    with Pace(len(wanted), "role", aside, silent=not parallel) as pace:
        for role, rehearsed in _all(settings, wanted, directory, parallel):
            found[role.rank] = rehearsed
            pace.advance()
    ranks = [
        {
            **found[role.rank][0],
            "stands_for": list(role.stands_for),
            "bounds": list(role.bounds),
            "why": role.why,
        }
        for role in wanted
    ]
    assert settings.world.size is not None
    apart = settings.tensor_parallel
    replicas = settings.world.size // (settings.pipeline.stages * apart)
    by_replica: dict[int, dict[int, dict[str, Any]]] = {}
    for role in wanted:
        by_replica.setdefault(role.rank // apart % replicas, {}).setdefault(role.stage, found[role.rank][1])
    return ranks, max((_whole([*stages.values()], apart) for stages in by_replica.values()), key=_cached)


def _whole(stages: list[dict[str, Any]], apart: int) -> dict[str, Any]:
    """What a replica's stages say of it: its cache is all of theirs, each of `apart` ranks with as many heads."""
    told = [done["inference"] for done in stages if "inference" in done]
    if not told:
        return stages[0]
    held = {key: apart * sum(each[key] for each in told) for key in MEASURED if told[0][key] is not None}
    if positions := told[0]["kv_positions"]:
        held["kv_bytes_per_token_measured"] = held["kv_filled"] // positions
    return {**stages[0], "inference": {**told[0], **held}}


def balanced(settings: Settings) -> Settings:
    """`settings` with a list of layers where they ask for `memory`: many rehearsals at once, with a progress bar."""
    if settings.pipeline.stages == 1 or settings.pipeline.split != "memory":
        return settings
    with workers(2 * settings.pipeline.stages) as pool, progress(None) as pace:

        def measure(tasks: Sequence[Task]) -> list[int]:
            found = []
            for highest in pool.map(peak, tasks):
                found.append(highest)
                pace.advance()
            return found

        return resolved(settings, measure)


def _cached(done: dict[str, Any]) -> int:
    """The bytes of a replica's largest KV cache: the largest of all is the run's."""
    return done.get("inference", {}).get("kv_reserved") or 0


def _all(
    settings: Settings, wanted: list[Role], directory: Path | None, parallel: bool
) -> Iterator[tuple[Role, tuple[dict[str, Any], dict[str, Any]]]]:
    """Each role as it is done: in this process where it is alone or the others wait, else each in its own."""
    from harness.rehearsal.one_rank import rehearse as one

    if len(wanted) == 1 or not parallel:
        for role in wanted:
            yield role, one(settings, role.rank, directory)
        return
    with workers(len(wanted)) as pool:
        running = {pool.submit(one, settings, role.rank, directory): role for role in wanted}
        for done in as_completed(running):
            yield running[done], done.result()
