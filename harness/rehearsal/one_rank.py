"""Rehearses one rank in this process: the run's own code on fake tensors, under the ledger."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.config.load import Settings
from harness.generation import cache_check, infer
from harness.ledger import Ledger
from harness.model.loader import model_config
from harness.model.misfit import misfits
from harness.model.partition import as_record, split_of
from harness.model.stage_check import prove
from harness.record import record_file, trace
from harness.record.memory import Rank
from harness.record.results import Results
from harness.rehearsal.world import rehearsed
from harness.training import train

GPU_BLOCK = 512
"""CUDA's caching allocator rounds sizes up to multiples of this: kMinBlockSize in c10/cuda/CUDACachingAllocator."""


def rehearse(settings: Settings, rank: int, directory: Path | None = None) -> tuple[Rank, Results]:
    """Rehearse rank `rank` of `settings.world.size`: its record, and the run's results.

    It writes its trace to `directory`, if there is one. Raises Refusal as the run itself would, and RuntimeError where
    a shim does not fit.
    """
    size, target = settings.world.size or 1, settings.hardware.device
    mode = train if settings.mode == "train" else infer
    stages = settings.pipeline.stages
    results = Results()
    if stages > 1:
        prove(settings)
        results.pipeline = as_record(settings, split_of(settings, model_config(settings.model)))
    cache_check.prove(settings)
    with (
        misfits(settings),
        warnings.catch_warnings(),
        rehearsed(
            rank, size, "cuda" if target == "cuda" else "cpu", stages, settings.tensor_parallel
        ) as world,
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        ledger = Ledger(
            steps=settings.ledger.steps,
            device=str(world.device),
            allocator=False,
            block=GPU_BLOCK if target == "cuda" else 1,
        )
        try:
            with _existing_objects_frozen(), ledger:
                mode.run(
                    settings,
                    world,
                    ledger,
                    record_file.Output(Path("/dev/null"), _quiet, results, _nothing),
                )
        except Exception as error:
            error.rehearsed = rank, ledger.where  # type: ignore[attr-defined]
            raise
    if directory is not None and settings.ledger.trace:
        trace.write(directory, rank, trace.of_ledger(ledger, timed=False))
    return record_file.rank_record(ledger, rank, world.stage, world.share), results


@contextmanager
def _existing_objects_frozen() -> Iterator[None]:
    """Exclude existing objects from garbage collection in this context: most objects are those of imported modules."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _quiet(line: str) -> None:
    """Print nothing: the losses of a rehearsed rank have no meaning."""


def _nothing() -> None:
    """Flush nothing."""
