"""Many rehearsals at once, in processes that have imported everything already.

Nothing here imports torch: whoever asks for rehearsals need not.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from harness.settings import Settings

if TYPE_CHECKING:
    from harness.rehearsal.roles import Role

MOST = 4
"""Roles of a stage that are rehearsed to find the worst of a config among many. Offloaded ZeRO-1 and 2 have more."""


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
    """A pool for so many tasks, on as many cores as there are. Where it is left by an exception, nothing goes on."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["harness.rehearsal.balance"])
    pool = ProcessPoolExecutor(max(1, min(tasks, os.cpu_count() or 1)), context, _leave_interrupts)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()  # a rehearsal has nothing to lose
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _leave_interrupts() -> None:
    """A terminal interrupts every process; the one that asked ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def rehearse_all(pool: ProcessPoolExecutor, wanted: Sequence[Settings], bar: Any = None) -> list[Worst]:
    """The worst rank under each of `wanted`, in parallel. `bar` is told of each that is done."""
    running = [pool.submit(worst, settings) for settings in wanted]
    for _ in as_completed(running):
        if bar is not None:
            bar.update()
    return [each.result() for each in running]


def progress(total: int | None) -> Any:
    """A bar for so many rehearsals, on a terminal."""
    return tqdm(total=total, unit="rehearsal", desc="rehearse", leave=False, disable=None)


def worst(settings: Settings) -> Worst:
    """The rank with the highest peak of the roles of `settings`' world, of a stage the `MOST` with the most to hold."""
    from harness.rehearsal.balance import resolved
    from harness.rehearsal.role import rehearse
    from harness.rehearsal.roles import roles

    try:
        settings = resolved(settings)
        every = sorted((role for role in roles(settings) if not role.outdone), key=lambda role: -role.held)
        tried = [role for stage in {role.stage for role in every} for role in _of(every, stage)[:MOST]]
        peaks = [(role.rank, rehearse(settings, role.rank)[0]["peak"]) for role in tried]
        rank, peak = max(peaks, key=lambda pair: pair[1]["bytes"])
    except Exception as error:  # another process asked; the error's class may not be known there
        return Worst(0, 0, {}, " ".join(f"{type(error).__name__}: {error}".split())[:200])
    held = {name: count for name, count in peak["categories"].items() if count}
    return Worst(peak["bytes"], rank, held, passed_over=len(every) - len(tried))


def _of(roles: "Sequence[Role]", stage: int) -> "list[Role]":
    return [role for role in roles if role.stage == stage]
