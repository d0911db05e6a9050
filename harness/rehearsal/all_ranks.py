"""A whole rehearsal: every representative rank of a world, and one record of them all."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.config.load import Refusal, Settings
from harness.config.rules.quantized import AT_FIRST, AT_LOAD
from harness.device.outside import budget
from harness.generation.generation_config import strategy_of
from harness.model.plan import Plan
from harness.model.resolve import resolve
from harness.record import record_file, verified
from harness.record.memory import Rank
from harness.record.results import Inference, Model, Results
from harness.record.schema import Record, World
from harness.rehearsal import UNVERIFIED, kernels, length
from harness.rehearsal.balance import Task, peak, resolved
from harness.rehearsal.places import EVERY, Progress, layers_of, leave, left
from harness.rehearsal.pool import portable, progress, workers
from harness.rehearsal.representatives import Representative, representatives_of
from harness.runtime.progress import Pace, aside

MEASURED = (
    *("kv_reserved", "kv_filled", "kv_live"),
    *("kv_pinned", "kv_state", "kv_host"),
)
"""The figures of `infer.largest` that count only one rank's own layers."""


def described(plan: Plan) -> World:
    """The record's `world` for a rehearsal of `plan`."""
    settings = plan.settings
    gpu = settings.hardware.device == "cuda"
    formed = budget(settings.hardware, plan.layout.size)
    return World(
        kind="rehearsed",
        size=plan.layout.size,
        device="cuda" if gpu else "cpu",
        device_name=settings.hardware.name if settings.hardware.device != "auto" else None,
        memory=None if formed is None else max(0, formed.bytes),
        verified=_verified(settings) if gpu else None,
        differences=list(_differences(plan)),
    )


def _verified(settings: Settings) -> str:
    """Whether rehearsals for this GPU were compared with real runs on one."""
    known = verified.of(settings.hardware.name)
    return UNVERIFIED if known is None else known.sentence()


def _differences(plan: Plan) -> Iterator[str]:
    """Sentences about the known differences from a real run of the same config."""
    settings = plan.settings
    if settings.model.path is not None and not settings.model.random:
        yield (
            "weights are initialised, not read: while a real run reads them, in setup, it has one parameter twice, "
            "and what it reads is not in the traffic"
        )
    if settings.mode == "infer" and settings.generation.stop_at_eos:
        yield "no sequence ends early: generation continues to generation.max_new_tokens"
    if settings.mode == "infer" and _looks_up_ngrams(plan):
        yield "encoder_no_repeat_ngram_size forbids other tokens, and so a few bytes of numbers are more or fewer"
    if settings.mode == "infer" and settings.generation.compile:
        yield "the decoding step is not compiled: what its program needs besides the cache is the compiler's choice"
    if settings.mode == "train" and settings.train.compile and settings.hardware.device != "cuda":
        yield (
            "compiled layers run operator by operator, in the forward and backward that the compiler makes of them: "
            "what their programs need meanwhile is in no figure, nor the numbers that one keeps, of 8 bytes each; a "
            "peak inside of a program may be higher"
        )
    if settings.hardware.device == "cuda" and (kernels_differ := kernels.difference(plan)):
        yield kernels_differ
    overlaps = settings.deepspeed.options.get("zero_optimization", {}).get("overlap_comm", False)
    if settings.hardware.device == "cuda" and overlaps:
        yield "overlap_comm sends on a stream of its own: a GPU reserves its blocks apart, and frees them later"
    if settings.mode == "train" and settings.train.clip and settings.pipeline.stages > 1:
        yield "gradients have no norm: where a real norm is above train.clip, gradients may be copied once more"
    if settings.mode == "train" and not settings.data.packing and settings.pipeline.stages == 1:
        yield "every micro-batch has padding: a real one that is full has no mask, and attention then needs less"
    if settings.mode == "train":
        yield "no text is read: where a real run's data ends and starts again, it has no next batch ready"


def _looks_up_ngrams(plan: Plan) -> bool:
    """Whether a logits processor depends on the values of tokens, and not only on their number."""
    try:
        strategy = strategy_of(plan.settings, plan.config)
    except Refusal:  # the rehearsal itself raises it
        return False
    return "encoder_no_repeat_ngram_size" in strategy.processed


def of_packing(model: Model) -> Iterator[str]:
    """The known differences for packed weights."""
    packed = model.quantization
    if packed is None or packed.whole == AT_LOAD:
        return
    yield (
        f"weights have the layout of {packed.method}: what its kernels need besides them, or convert them to, to be "
        "faster, is not in these figures"
    )
    if packed.method == "mxfp4":
        yield "transformers computes in mxfp4 where triton and kernels are installed, and unpacks weights elsewhere"
    if packed.whole == AT_FIRST:
        yield "weights are unpacked all at once: a real run has a few copies of one layer meanwhile"


def rehearsed(settings: Settings, overrides: Sequence[str], parallel: bool = True) -> Record:
    """The record of a rehearsal that writes nothing to disk. With `parallel` each representative has its own process.

    Raises Refusal and any other exception, as the run itself would.
    """
    plan = resolve(settings)
    ranks, results = rehearse(plan, parallel=parallel)
    head = record_file.head(plan.settings, plan.reasons, overrides, described(plan))
    return whole(head, ranks, results)


def whole(head: Record, ranks: list[Rank], results: Results) -> Record:
    """The record of a rehearsal that is complete, from the one of its beginning."""
    assert results.model is not None
    world = head.world.plus(differences=[*head.world.differences, *of_packing(results.model)])
    return head.plus(status="complete", world=world, **results.parts, ranks=ranks)


def rehearse(plan: Plan, directory: Path | None = None, parallel: bool = True) -> tuple[list[Rank], Results]:
    """Rehearse every representative rank of the world of `plan`: the ranks' records, and the run's results.

    The ranks write their traces to `directory`, if there is one. Without `parallel` all of them run in this process
    and silently, for a caller that itself runs many rehearsals at once.

    Raises Refusal and any other exception as the run itself would, and RuntimeError where a shim does not fit.
    """
    length.check(plan.settings)
    plan = balanced(plan) if parallel else resolved(plan)
    representatives = representatives_of(plan)
    by_rank: dict[int, tuple[Rank, Results]] = {}
    with Pace(layers_of(plan, representatives), "layer", aside, silent=not parallel) as pace:
        places = Progress(plan, representatives, pace)
        pace.more = places.text
        for representative, result in _results(
            plan, representatives, directory, places if parallel else None
        ):
            by_rank[representative.rank] = result
            places.at(representative.rank, None)
    ranks = [
        by_rank[representative.rank][0].plus(
            stands_for=list(representative.equivalent_ranks),
            bounds=list(representative.bounds),
            why=representative.why,
        )
        for representative in representatives
    ]
    by_dp_rank: dict[int, dict[int, Results]] = {}
    for representative in representatives:
        by_dp_rank.setdefault(plan.layout.dp_rank(representative.rank), {}).setdefault(
            representative.stage, by_rank[representative.rank][1]
        )
    return ranks, max(
        (_merge_stages([*stages.values()], plan.layout.tp_size) for stages in by_dp_rank.values()),
        key=_cache_bytes,
    )


def _merge_stages(stages: list[Results], tp_size: int) -> Results:
    """One result for a replica from those of its stages, with the KV cache of all its ranks.

    The `tp_size` ranks that share a layer have the same number of heads, so the figures are multiplied.
    """
    inferences = [each.inference for each in stages if each.inference is not None]
    if not inferences:
        return stages[0]
    totals = {
        key: tp_size * sum(getattr(each, key) for each in inferences)
        for key in MEASURED
        if getattr(inferences[0], key) is not None
    }
    if positions := inferences[0].kv_positions:
        totals["kv_bytes_per_token_measured"] = totals["kv_filled"] // positions
    return replace(stages[0], inference=inferences[0].plus(**totals))


def balanced(plan: Plan) -> Plan:
    """`plan` with `pipeline.split=memory` replaced by a list of layers, from parallel rehearsals."""
    pipeline = plan.settings.pipeline
    if pipeline.stages == 1 or pipeline.split != "memory":
        return plan
    with workers() as pool, progress(None) as pace:

        def measure(tasks: Sequence[Task]) -> list[int]:
            peaks = []
            for highest in pool.map(partial(portable, peak), tasks):
                peaks.append(highest)
                pace.advance()
            return peaks

        return resolved(plan, measure)


def _cache_bytes(results: Results) -> int:
    """The bytes of a replica's largest KV cache. The run's figures are those of the replica with the most."""
    return (results.inference or Inference()).kv_reserved or 0


def _results(
    plan: Plan, representatives: list[Representative], directory: Path | None, places: Progress | None
) -> Iterator[tuple[Representative, tuple[Rank, Results]]]:
    """Each representative with its result, as soon as it ends. `places` hears where they are.

    A single one, or any without `places`, runs in this process; else each runs in a process of its own.
    """
    from harness.rehearsal.one_rank import rehearse as one

    if len(representatives) == 1 or places is None:
        for each in representatives:
            report = None if places is None else partial(places.at, each.rank)
            yield each, one(plan, each.rank, directory, report=report)
        return
    with TemporaryDirectory() as folder, workers() as pool:  # a worker that is killed writes no more to it
        files = {each.rank: Path(folder, str(each.rank)) for each in representatives}
        running = {
            pool.submit(
                portable, one, plan, each.rank, directory, report=partial(leave, files[each.rank])
            ): each
            for each in representatives
        }
        while running:
            ended, _ = wait(running, EVERY, FIRST_COMPLETED)
            for future in ended:
                yield running.pop(future), future.result()
            for each in running.values():
                if (seen := left(files[each.rank])) is not None:
                    places.at(each.rank, seen)
