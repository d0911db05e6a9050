"""Runs many rehearsals at once, in worker processes that have already imported everything.

This module imports no torch, so its callers need not load it.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

from harness.config.load import Settings
from harness.runtime.progress import Pace, aside

if TYPE_CHECKING:
    from harness.record.memory import Rank
    from harness.rehearsal.representatives import Representative

MOST = 4
"""The most representatives of a stage to rehearse for a config's worst rank. Offloaded ZeRO-1 and 2 have more."""


REFUSED = "Refusal: "
"""The prefix of a failure whose cause is an impossible request or model, and not an error of the rehearsal."""


class Worst(NamedTuple):
    """The rank with the highest peak, in bytes, and its categories; or in `failure` the reason why there is none."""

    bytes: int
    rank: int
    categories: dict[str, int]
    failure: str = ""
    passed_over: int = 0
    """How many representatives were left out, because `MOST` have larger partitions; one may peak a bit higher."""


@contextmanager
def workers(tasks: int) -> Iterator[ProcessPoolExecutor]:
    """A pool for `tasks` tasks, on the cores that this process may use. An exception in the body kills the workers."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["harness.rehearsal.balance"])
    pool = ProcessPoolExecutor(max(1, min(tasks, _cores())), context, _leave_interrupts)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()  # safe: a rehearsal has no state to save
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # a container or a job may be limited to a few cores
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _leave_interrupts() -> None:
    """Ignore Ctrl-C in a worker: the terminal sends it to every process, and the parent ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def rehearse_all(
    pool: ProcessPoolExecutor, wanted: Sequence[Settings], pace: Pace | None = None
) -> list[Worst]:
    """The worst rank under each of `wanted`, with all ranks in parallel. `pace` advances with each finished config."""
    candidate_sets = [each.result() for each in [pool.submit(candidates, settings) for settings in wanted]]
    running = [
        [pool.submit(_rehearsed, each.settings, rank) for rank in each.ranks] for each in candidate_sets
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


def _rehearsed(settings: Settings, rank: int) -> "Rank | str":
    """A rank's record; or the reason why there is none."""
    from harness.model.plan import Plan
    from harness.rehearsal.one_rank import rehearse

    try:
        return rehearse(Plan.of(settings), rank)[0].plus(phases=[])  # they are long, and not needed
    except Exception as error:
        return _error_text(error)


def _highest(candidates: Candidates, ranks: "Sequence[Rank | str]") -> Worst:
    failure = candidates.failure or next((rank for rank in ranks if isinstance(rank, str)), "")
    if failure:
        return Worst(0, 0, {}, failure)
    worst = max((rank for rank in ranks if not isinstance(rank, str)), key=lambda rank: rank.peak.bytes or 0)
    categories = {name: count for name, count in worst.peak.categories.items() if count}
    return Worst(worst.peak.bytes or 0, worst.rank, categories, passed_over=candidates.passed_over)


def _error_text(error: Exception) -> str:
    """The error as text: its class may not exist in the process that receives it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _of_stage(representatives: "Sequence[Representative]", stage: int) -> "list[Representative]":
    return [representative for representative in representatives if representative.stage == stage]
