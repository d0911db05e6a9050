"""Many rehearsals at once, in processes that have imported everything already.

Nothing here imports torch: whoever asks for rehearsals need not.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.config.load import Settings
from harness.runtime.progress import Pace, aside

if TYPE_CHECKING:
    from harness.rehearsal.representatives import Role

MOST = 4
"""Roles of a stage that are rehearsed to find the worst of a config among many. Offloaded ZeRO-1 and 2 have more."""


REFUSED = "Refusal: "
"""How the failure of a rehearsal begins that the model, or the request, cannot have."""


class Worst(NamedTuple):
    """The rank of a rehearsal with the highest peak, and what is in it; or, in words, why there is none."""

    bytes: int
    rank: int
    categories: dict[str, int]
    failure: str = ""
    passed_over: int = 0
    """Roles with smaller partitions than the `MOST` that were rehearsed: one of them may peak a little higher."""


@contextmanager
def workers(tasks: int) -> Iterator[ProcessPoolExecutor]:
    """A pool for so many tasks, on as many cores as it may use. Where it is left by an exception, nothing goes on."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["harness.rehearsal.balance"])
    pool = ProcessPoolExecutor(max(1, min(tasks, _cores())), context, _leave_interrupts)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()  # a rehearsal has nothing to lose
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # a container or a job may have few of the machine's
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _leave_interrupts() -> None:
    """A terminal interrupts every process; the one that asked ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def rehearse_all(
    pool: ProcessPoolExecutor, wanted: Sequence[Settings], pace: Pace | None = None
) -> list[Worst]:
    """The worst rank under each of `wanted`, all their ranks in parallel. `pace` is told of each that is done."""
    asked = [each.result() for each in [pool.submit(candidates, settings) for settings in wanted]]
    running = [[pool.submit(_peak, each.settings, rank) for rank in each.ranks] for each in asked]
    found = []
    for each, peaks in zip(asked, running, strict=True):
        found.append(_highest(each, [peak.result() for peak in peaks]))
        if pace is not None:
            pace.advance()
    return found


def progress(total: int | None) -> Pace:
    """How far so many rehearsals are."""
    return Pace(total, "rehearsal", aside)


def decided(pool: ProcessPoolExecutor, settings: Settings) -> tuple[Settings, dict[str, str]]:
    """`settings` without `auto`, and why, as `model/resolve.py` has it. Raises Refusal."""
    return pool.submit(_decided, settings).result()


def _decided(settings: Settings) -> tuple[Settings, dict[str, str]]:
    from harness.model.resolve import resolve

    resolved = resolve(settings)
    return resolved.settings, dict(resolved.reasons)


class Candidates(NamedTuple):
    """The ranks of a config among which the worst is; or, in words, why there are none."""

    settings: Settings
    ranks: list[int]
    passed_over: int = 0
    failure: str = ""


def worst(settings: Settings) -> Worst:
    """The rank with the highest peak of the roles of `settings`' world, of a stage the `MOST` with the most to hold."""
    asked = candidates(settings)
    return _highest(asked, [_peak(asked.settings, rank) for rank in asked.ranks])


def candidates(settings: Settings) -> Candidates:
    """The ranks to rehearse for `worst`."""
    from harness.model.resolve import resolve
    from harness.rehearsal.balance import resolved
    from harness.rehearsal.representatives import roles

    try:
        settings = resolved(resolve(settings).settings)
        every = sorted((role for role in roles(settings) if not role.outdone), key=lambda role: -role.held)
    except Exception as error:
        return Candidates(settings, [], failure=_words(error))
    tried = [role.rank for stage in {role.stage for role in every} for role in _of(every, stage)[:MOST]]
    return Candidates(settings, tried, len(every) - len(tried))


def _peak(settings: Settings, rank: int) -> dict[str, Any] | str:
    """A rank's peak, as its record has it; or why there is none."""
    from harness.rehearsal.one_rank import rehearse

    try:
        peak: dict[str, Any] = rehearse(settings, rank)[0]["peak"]
    except Exception as error:
        return _words(error)
    return {**peak, "rank": rank}


def _highest(asked: Candidates, peaks: Sequence[dict[str, Any] | str]) -> Worst:
    failure = asked.failure or next((peak for peak in peaks if isinstance(peak, str)), "")
    if failure:
        return Worst(0, 0, {}, failure)
    peak = max((peak for peak in peaks if not isinstance(peak, str)), key=lambda peak: peak["bytes"])
    held = {name: count for name, count in peak["categories"].items() if count}
    return Worst(peak["bytes"], peak["rank"], held, passed_over=asked.passed_over)


def _words(error: Exception) -> str:
    """Another process asked; the error's class may not be known there."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _of(roles: "Sequence[Role]", stage: int) -> "list[Role]":
    return [role for role in roles if role.stage == stage]
