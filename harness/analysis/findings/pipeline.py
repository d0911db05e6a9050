"""Findings about a pipeline's stages, each from figures of the record. It imports no torch."""

from collections.abc import Iterator

from harness.analysis.findings.finding import NOTABLE, Finding, Run
from harness.record.memory import Rank
from harness.record.schema import Record
from harness.tables import size


def stash(run: Run) -> Iterator[Finding]:
    """A stage keeps the activations of several forwards at once, until their backward."""
    record, first = run.record, run.record.by_stage.get(0)
    forwards = first.forwards if first else None
    if record.pipeline.stages < 2 or first is None or forwards is None or forwards.alive < 2:
        return
    counts = [rank.forwards.alive for _, rank in sorted(record.by_stage.items()) if rank.forwards]
    sentence = (
        f"Stage 0 of {record.pipeline.stages} keeps {kept_by(first)} for their backward at once, "
        f"{size(forwards.bytes)}; by stage they are {', '.join(map(str, counts))}: under 1F1B one for each stage "
        f"from it on, and no more than the {record.pipeline.micro_batches} micro-batches of a step."
    )
    yield Finding("stash", sentence, forwards.bytes)


def ends(run: Run) -> Iterator[Finding]:
    """The first or the last stage has more parameters than the others, because of the embedding or the head."""
    cut, ranks = run.record.pipeline, run.record.by_stage
    if (
        cut.stages < 2
        or {*ranks} != {*range(cut.stages)}
        or len(cut.split) < cut.stages
        or min(cut.split) < 2
    ):
        return
    layers = min(cut.split)
    parameters = {stage: rank.highest.get("parameters") or 0 for stage, rank in ranks.items()}
    lowest = min(parameters, key=lambda stage: parameters[stage])
    for stage, extra in ((0, "the embedding"), (cut.stages - 1, "the norm and the head")):
        more = parameters[stage] - parameters[lowest]
        if cut.split[stage] == layers and more > NOTABLE * parameters[stage]:
            sentence = (
                f"Stage {stage} has {size(more)} more parameters than stage {lowest}, for {extra}; "
                "pipeline.split=parameters or memory give it fewer layers."
            )
            yield Finding("ends", sentence, more)


def bubble(run: Run) -> Iterator[Finding]:
    """The stages are idle for a large share of a step, because they wait for each other."""
    cut = run.record.pipeline
    if cut.stages < 2 or cut.bubble is None or cut.bubble < 2 * NOTABLE:
        return
    micro_batches = cut.micro_batches or 1
    enough = 9 * (cut.stages - 1)
    sentence = (
        f"Each stage waits for the others for {cut.bubble:.0%} of a step: {cut.stages} stages and {micro_batches} "
        f"micro-batch{'es' * (micro_batches > 1)}; train.accumulation={enough} would make that 10%, and keep "
        f"no more forwards{'' if micro_batches >= cut.stages else ' than one a stage'}."
    )
    yield Finding("bubble", sentence, None)


def without_zero(run: Run) -> Iterator[Finding]:
    """DeepSpeed gives a bf16 pipeline without ZeRO an optimizer that shards its state anyway."""
    if run.record.pipeline.stages > 1 and run.record.training.optimizer == "BF16_Optimizer":
        sentence = (
            "DeepSpeed gives a bf16 pipeline under ZeRO-0 its BF16_Optimizer: gradients are kept in fp32 too, and "
            "masters and moments are partitioned over the replicas."
        )
        yield Finding("without_zero", sentence, None)


def grew(first: Record, first_name: str, other: Record, other_name: str) -> Iterator[str]:
    """A sentence: how many forwards wait for their backward in each of two runs, and the bytes that they keep."""
    pair = (first, first_name), (other, other_name)
    if not any(record.pipeline.stages > 1 for record, _ in pair) and first.mode == other.mode:
        return
    worst_ranks = [_most(record) for record, _ in pair]
    if None in worst_ranks:
        return
    parts = []
    for (record, name), rank in zip(pair, worst_ranks, strict=True):
        assert rank is not None
        stages = record.pipeline.stages
        where = f" on stage {rank.stage} of {stages}" if stages > 1 else ""
        parts.append(f"{name} keeps {kept_by(rank)}{where}")
    explanation = (
        "inference has no backward"
        if "infer" in (first.mode, other.mode)
        else "a stage keeps one for each stage from it on"
    )
    yield f"Of activations kept for backward at once, {parts[0]}, and {parts[1]}: {explanation}."


def _most(record: Record) -> Rank | None:
    """The rank whose waiting forwards keep the most bytes; None where that was not measured."""
    measured = [rank for rank in record.ranks if rank.forwards is not None]
    return max(measured, key=lambda rank: rank.forwards.bytes if rank.forwards else 0, default=None)


def kept_by(rank: Rank) -> str:
    """How many forwards a rank keeps, and the bytes of each."""
    forwards = rank.forwards
    if forwards is None or not forwards.alive:
        return "none"
    each = "" if not forwards.stashes else f" of {size(max(forwards.stashes))}"
    return f"{forwards.alive} forward{'s' * (forwards.alive > 1)}{each}{' each' * (forwards.alive > 1)}"


STAGES = (stash, ends, bubble, without_zero)
"""The findings in printing order."""
