"""The finding about traffic: what moves most in a step or a batch, and which setting would move less of it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.analysis.findings.finding import Finding, Run
from harness.analysis.moves import transfers
from harness.analysis.moves.links_model import COPIES
from harness.analysis.moves.transfers import Flow
from harness.record.links import STORAGE
from harness.record.memory import Transfer
from harness.tables import size

if TYPE_CHECKING:
    from harness.config.settings import Settings

REDUCES = ("all-reduce", "reduce-scatter", "reduce")


def moves(run: Run) -> Iterator[Finding]:
    """What a step or a batch moves most of, beside its own text; on the rank that moves most."""
    moved = transfers.worst(run.record)
    if moved is None:
        return
    rank, rows = moved
    offloads = run.settings is not None and _offload(run.settings) != ""
    flows = [
        flow
        for flow in transfers.flows(rows)
        if flow.link != STORAGE and (offloads or flow.operation not in COPIES)
    ]
    most = max(flows, key=lambda flow: flow.bytes, default=None)
    if most is None or not most.bytes:
        return
    same = [row for row in rows if (row.phase, row.operation) == (most.phase, most.operation)]
    cause = "".join(f", most for {name}" for name, _ in transfers.largest(same, 1))
    unit = "batch" if run.record.mode == "infer" else "step"
    sentence = (
        f"A {unit} moves {size(sum(row.bytes for row in rows))} on rank {rank.rank}: {size(most.bytes)} of it by "
        f"{most.operation} in {most.phase} over {most.link}{cause}."
    )
    remedy = "" if run.settings is None else _remedy(run.settings, most, same)
    yield Finding("traffic", f"{sentence} {remedy}".rstrip(), most.bytes)


def _offload(settings: "Settings") -> str:
    """The setting that keeps what a step needs in the host's memory; empty: none does."""
    if settings.mode == "infer":
        return "generation.cache=offloaded" if settings.generation.cache == "offloaded" else ""
    return "" if settings.zero.offload == "none" else f"zero.offload={settings.zero.offload}"


def _remedy(settings: "Settings", most: Flow, rows: Sequence[Transfer]) -> str:
    """The setting that would move less of it; empty where none is known."""
    if most.operation in COPIES:
        return f"{_offload(settings)} is why it comes and goes, and saves the device that memory."
    if settings.mode == "infer":
        shares = settings.generation.tensor_parallel > 1 and most.operation == "all-reduce"
        return "pipeline.stages= in place of generation.tensor_parallel= sends hidden states alone." * shares
    stage, times = settings.zero.stage, len({row.micro_batch for row in rows})
    if most.operation in REDUCES and most.phase == "backward" and stage >= 2 and times > 1:
        return f"ZeRO-{stage} reduces the gradients of each of {times} micro-batches; zero=1 reduces their sum once."
    if most.operation in REDUCES and most.phase == "backward" and stage < 2:
        return "A larger train.accumulation moves it for more tokens."
    if most.operation == "all-gather" and most.phase != "step" and stage == 3:
        return "ZeRO-3 gathers parameters for each forward and backward; zero=2 does once a step, and holds them whole."
    return ""


MOVED = (moves,)
"""The findings in printing order."""
