"""Runs many rehearsals at once, in worker processes that have already imported everything.

This module imports no torch, so its callers need not load it.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

from harness.config.load import Settings
from harness.device.replay import Alternative
from harness.runtime.progress import Pace, aside

if TYPE_CHECKING:
    from harness.rehearsal.card_memory import CardMemory
    from harness.rehearsal.representatives import Representative

MOST = 4
"""The most representatives of a stage to rehearse for a config's worst rank. Offloaded ZeRO-1 and 2 have more."""


REFUSED = "Refusal: "
"""The prefix of a failure whose cause is an impossible request or model, and not an error of the rehearsal."""


OF_ALLOCATOR = ("allocated", "reserved", "exhausted", "alternatives")
"""Fields of `Worst` that are of the rank whose GPU has the most reserved."""


class Worst(NamedTuple):
    """The rank with the highest peak, in bytes, and its categories; or in `failure` the reason why there is none."""

    bytes: int
    rank: int
    categories: dict[str, int]
    failure: str = ""
    passed_over: int = 0
    """How many representatives were left out, because `MOST` have larger partitions; one may peak a bit higher."""
    allocated: int | None = None
    """The most that a GPU's allocator had in blocks. None on a CPU."""
    reserved: int | None = None
    """The most that it had in segments. None on a CPU."""
    exhausted: bool = False
    """Whether the GPU's memory was used up, even after its cache was emptied."""
    alternatives: tuple[Alternative, ...] = ()
    """Other settings of the allocator, best first, where they were tried."""

    bound: bool = False
    """Whether nothing was rehearsed, and `bytes` is what a rank surely has: a lower bound, from shapes alone."""

    unseen: tuple[str, ...] = ()
    """What the ledger did not see, as sentences."""

    @property
    def needs(self) -> int:
        """The bytes of memory that it takes."""
        return self.bytes if self.reserved is None else self.reserved


_warm: dict[str, ProcessPoolExecutor] = {}
"""The pool of this process, by the working directory that its workers started in: paths are relative to it."""


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """A pool on the cores that this process may use. It stays for the next caller, with all that it has imported.

    An exception in the body kills the workers. They end with this process, however it ends.
    """
    directory = os.getcwd()
    if directory not in _warm:
        end()
        context = get_context("forkserver")
        context.set_forkserver_preload(["harness.rehearsal.balance"])
        _warm[directory] = ProcessPoolExecutor(_cores(), context, _begin)
    pool = _warm[directory]
    try:
        yield pool
    except BaseException:
        _warm.pop(directory, None)
        for process in list((pool._processes or {}).values()):
            process.kill()  # safe: a rehearsal has no state to save
        pool.shutdown(cancel_futures=True)
        raise


def end() -> None:
    """End the warm workers, before a process that skips Python's shutdown."""
    while _warm:
        _warm.popitem()[1].shutdown()


def _cores() -> int:
    if limit := os.environ.get("LOKY_MAX_CPU_COUNT", ""):  # joblib's; a sweep gives each of its jobs a part
        return int(limit)
    if hasattr(os, "sched_getaffinity"):  # a container or a job may be limited to a few cores
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin() -> None:
    """Ignore Ctrl-C in a worker: the terminal sends it to every process, and the parent ends the workers.

    A parent that ends without that, as `os._exit` does, leaves nobody to end them: each watches for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def rehearse_all(
    pool: ProcessPoolExecutor, wanted: Sequence[Settings], pace: Pace | None = None, advised: int = 0
) -> list[Worst]:
    """The worst rank under each of `wanted`, with all ranks in parallel. `pace` advances with each finished config.

    For the first `advised` of them other settings of a GPU's allocator are tried; for the others where only what it
    reserves beyond what is allocated does not fit.
    """
    candidate_sets = [each.result() for each in [pool.submit(candidates, settings) for settings in wanted]]
    running = [
        [pool.submit(_rehearsed, each.settings, rank, index < advised) for rank in each.ranks]
        for index, each in enumerate(candidate_sets)
    ]
    results = []
    for each, ranks in zip(candidate_sets, running, strict=True):
        results.append(_highest(each, [rank.result() for rank in ranks]))
        if pace is not None:
            pace.advance()
    return results


def progress(total: int | None) -> Pace:
    """A progress bar for `total` rehearsals."""
    return Pace(total, "rehearsal", aside)


def decided(pool: ProcessPoolExecutor, settings: Settings) -> tuple[Settings, dict[str, str]]:
    """`settings` with every `auto` resolved by `model/resolve.py`, and the reasons. Raises Refusal."""
    return pool.submit(_decided, settings).result()


def _decided(settings: Settings) -> tuple[Settings, dict[str, str]]:
    from harness.model.resolve import resolve

    plan = resolve(settings)
    return plan.settings, dict(plan.reasons)


def at_least(settings: Settings) -> int:
    """Bytes that the worst rank surely has, from shapes alone: its parameters, or its part of them under ZeRO-3.

    With d ranks that have the same layers, N elements of e bytes: N e, and N e / d under ZeRO-3 (Rajbhandari et al.
    2020, arXiv 1910.02054, section 5). A rank has more, but never less. 0 where nothing is certain: stages, shared
    layers, packed weights, parameters on the host, a config that is refused.
    """
    import torch

    from harness.model import init_weights
    from harness.model.resolve import resolve

    try:
        plan = resolve(settings)
        layout, config = plan.layout, plan.config
        packed = getattr(config, "quantization_config", None) is not None
        offloaded = settings.mode == "train" and settings.zero.offload == "all"
        if layout.stages > 1 or layout.tp_size > 1 or packed or offloaded:
            return 0
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[plan.settings.precision]
        whole: int = sum(
            parameter.numel() * parameter.element_size()
            for parameter in init_weights.outline(config, dtype).parameters()
        )
    except Exception:  # the rehearsal words it
        return 0
    sharded = settings.mode == "train" and settings.zero.stage == 3
    return whole // layout.dp_size if sharded else whole


class Candidates(NamedTuple):
    """The ranks of a config to rehearse for the worst one; or in `failure` the reason why there are none.

    Its settings are those of the plan. The plan itself would need torch in the process that starts the workers.
    """

    settings: Settings
    ranks: list[int]
    passed_over: int = 0
    failure: str = ""


def worst(settings: Settings) -> Worst:
    """The rank with the highest peak in `settings`' world, among at most `MOST` representatives of each stage."""
    chosen = candidates(settings)
    return _highest(chosen, [_rehearsed(chosen.settings, rank) for rank in chosen.ranks])


def candidates(settings: Settings) -> Candidates:
    """The ranks to rehearse for `worst`."""
    from harness.model.resolve import resolve
    from harness.rehearsal.balance import resolved
    from harness.rehearsal.representatives import representatives_of

    try:
        plan = resolved(resolve(settings))
        ordered = sorted(
            (representative for representative in representatives_of(plan) if not representative.dominated),
            key=lambda representative: -representative.size,
        )
    except Exception as error:
        return Candidates(settings, [], failure=_error_text(error))
    ranks = [
        representative.rank
        for stage in {representative.stage for representative in ordered}
        for representative in _of_stage(ordered, stage)[:MOST]
    ]
    return Candidates(plan.settings, ranks, len(ordered) - len(ranks))


def _rehearsed(settings: Settings, rank: int, advised: bool = False) -> Worst:
    """One rank of a config; with `advised`, and under which settings of a GPU's allocator it would take less."""
    from harness.model.plan import Plan
    from harness.rehearsal.one_rank import rehearse

    alternatives: list[Alternative] = []

    def learn(memory: "CardMemory") -> None:
        fragmented = memory.exhausted is not None and memory.peak_allocated <= (memory.capacity or 0)
        if advised or fragmented:
            alternatives.extend(memory.alternatives())

    try:
        record = rehearse(Plan.of(settings), rank, learn=learn)[0]
    except Exception as error:
        return Worst(0, 0, {}, _error_text(error))
    peak = record.peak
    return Worst(
        peak.bytes or 0,
        rank,
        {name: count for name, count in peak.categories.items() if count},
        allocated=peak.allocated,
        reserved=peak.reserved,
        exhausted=record.allocator.exhausted is not None,
        alternatives=tuple(alternatives),
        unseen=tuple(record.unseen),
    )


def _highest(candidates: Candidates, ranks: Sequence[Worst]) -> Worst:
    failure = candidates.failure or next((rank.failure for rank in ranks if rank.failure), "")
    if failure:
        return Worst(0, 0, {}, failure)
    worst = max(ranks, key=lambda rank: rank.bytes)
    fullest = max(ranks, key=lambda rank: (rank.exhausted, rank.needs))
    of_allocator = {name: getattr(fullest, name) for name in OF_ALLOCATOR}
    return worst._replace(passed_over=candidates.passed_over, **of_allocator)


def _error_text(error: Exception) -> str:
    """The error as text: its class may not exist in the process that receives it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _of_stage(representatives: "Sequence[Representative]", stage: int) -> "list[Representative]":
    return [representative for representative in representatives if representative.stage == stage]
