"""Rehearses one rank in this process: the run's own code on fake tensors, under the ledger."""

import warnings
from collections.abc import Callable
from pathlib import Path

from harness.config.settings import Refusal
from harness.generation import cache_check, infer
from harness.ledger import Ledger
from harness.ledger.patch import patched
from harness.ledger.unseen import NotSeen
from harness.model.misfit import misfits
from harness.model.partition import as_record
from harness.model.plan import Plan
from harness.model.stage_check import prove
from harness.record import record_file, trace
from harness.record.links import nodes_of
from harness.record.memory import Rank
from harness.record.results import Results
from harness.rehearsal import card_memory
from harness.rehearsal.card_ledger import CardLedger
from harness.rehearsal.card_memory import CardMemory
from harness.rehearsal.course import Shortened
from harness.rehearsal.fake_mode import existing_objects_frozen
from harness.rehearsal.partitioned import partition
from harness.rehearsal.places import Place, watched
from harness.rehearsal.shims import PACKED_PARAMETER
from harness.rehearsal.world import rehearsed
from harness.runtime.memory_snapshot import snapshot_file
from harness.training import train


def rehearse(
    plan: Plan,
    rank: int,
    directory: Path | None = None,
    learn: Callable[[CardMemory], None] = lambda memory: None,
    report: Callable[[Place], object] | None = None,
) -> tuple[Rank, Results]:
    """Rehearse rank `rank` of the world of `plan`: its record, and the run's results.

    It writes its trace to `directory`, if there is one, and a GPU's memory snapshot. `learn` gets a GPU's memory at the
    end, and `report` the place of the rank a few times a second. Raises Refusal as the run itself would, and
    RuntimeError where a shim does not fit.
    """
    settings = plan.settings
    memory = None
    if settings.hardware.device == "cuda":
        try:
            memory = card_memory.of(settings.hardware, plan.layout.size)
        except ValueError as error:
            raise Refusal("hardware.allocator", settings.hardware.allocator, str(error)) from None
    compiler = partition if memory is None else None
    if memory is not None and settings.train.compile:
        memory.uncompiled = True
    mode = train if settings.mode == "train" else infer
    results = Results()
    if settings.pipeline.stages > 1:
        prove(plan)
        results.pipeline = as_record(settings, plan.split)
    cache_check.prove(plan)
    mode.prove(plan, "cpu" if memory is None else "cuda")
    packed = (PACKED_PARAMETER,) if settings.adapter.kind == "qlora" else ()
    with (
        misfits(plan),
        warnings.catch_warnings(),
        rehearsed(rank, plan.layout, memory) as world,
        patched(*packed),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", category=NotSeen)  # the record says it
        ledger = (
            Ledger(steps=settings.ledger.steps, device="cpu", allocator=False)
            if memory is None
            else CardLedger(memory, steps=settings.ledger.steps)
        )
        try:
            with existing_objects_frozen(), ledger, watched(ledger, report):
                output = record_file.Output(Path("/dev/null"), _quiet, results, _nothing)
                mode.run(plan, world, ledger, output, Shortened(compiler))
                if memory is not None and settings.mode == "train":
                    memory.go_on(settings.train.steps - settings.ledger.steps)
        except Exception as error:
            error.rehearsed = rank, ledger.where  # type: ignore[attr-defined]
            raise
    if directory is not None and settings.ledger.trace:
        trace.write(directory, rank, trace.of_ledger(ledger, timed=False))
    if directory is not None and settings.ledger.snapshot and isinstance(ledger, CardLedger):
        ledger.snapshot(snapshot_file(directory, rank))
    if memory is not None:
        learn(memory)
    return record_file.rank_record(ledger, rank, world.stage, world.tp_rank, nodes_of(settings)), results


def _quiet(line: str) -> None:
    """Print nothing: the losses of a rehearsed rank have no meaning."""


def _nothing() -> None:
    """Flush nothing."""
