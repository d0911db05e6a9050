"""Runs many rehearsals at once, in worker processes that have already imported everything.

This module imports no torch, so its callers need not load it.
"""

import asyncio
import gc
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from harness.config.load import Refusal, Settings
from harness.device.replay import Alternative
from harness.record.memory import Transfer
from harness.rehearsal import length
from harness.rehearsal.moments import Moment, moments_of
from harness.runtime import tracebacks
from harness.runtime.progress import Pace, aside

if TYPE_CHECKING:
    from harness.rehearsal.card_memory import CardMemory
    from harness.rehearsal.representatives import Representative

Result = TypeVar("Result")

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

    moments: tuple[Moment, ...] = ()
    """The highest of each phase."""

    traffic: tuple[tuple[Transfer, ...] | None, ...] = ()
    """What moved on each rank that was rehearsed. None: it was not counted."""

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
    try:
        yield started()
    except BaseException:
        end()
        raise


def started() -> ProcessPoolExecutor:
    """The pool. The server that forks its workers begins to import at once: what the caller does meanwhile costs no
    time.
    """
    directory = os.getcwd()
    if directory not in _warm:
        end()
        context = get_context("forkserver")
        context.set_forkserver_preload(["harness.rehearsal.balance"])
        _warm[directory] = ProcessPoolExecutor(cores(), context, _begin)
        forkserver.ensure_running()
    return _warm[directory]


def end() -> None:
    """End the warm workers, before a process that skips Python's shutdown ends. Those at work are killed: they have no
    state to save.
    """
    while _warm:
        pool = _warm.popitem()[1]
        if pool._pending_work_items:
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown(cancel_futures=True)
        del pool
    gc.collect()  # Python warns of the semaphores of a pool that is not collected


def cores() -> int:
    """How many rehearsals run at once: the cores that this process may use."""
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

    async def one(index: int, settings: Settings) -> Worst:
        result = await worst_of(pool, settings, index < advised)
        if pace is not None:
            pace.advance()
        return result

    async def all_of_them() -> list[Worst]:
        return await asyncio.gather(*(one(index, each) for index, each in enumerate(wanted)))

    return asyncio.run(all_of_them())


async def worst_of(pool: ProcessPoolExecutor, settings: Settings, advised: bool = False) -> Worst:
    """`worst` in the workers, with all ranks in parallel."""
    chosen = await in_worker(pool, candidates, settings)
    ranks = [in_worker(pool, _rehearsed, chosen.settings, rank, advised) for rank in chosen.ranks]
    return _highest(chosen, await asyncio.gather(*ranks))


async def in_worker(pool: ProcessPoolExecutor, act: Callable[..., Result], *arguments: object) -> Result:
    """What `act` returns in a worker."""
    return await asyncio.get_running_loop().run_in_executor(pool, portable, act, *arguments)


def portable(act: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """What `act` returns, in a worker. An error that another process could not receive becomes a RuntimeError."""
    try:
        return act(*arguments, **options)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            sendable = RuntimeError(tracebacks.sentence(error))
            vars(sendable).update({"rehearsed": getattr(error, "rehearsed", (0, None))})
            raise sendable from None
        raise


def progress(total: int | None) -> Pace:
    """A progress bar for `total` rehearsals."""
    return Pace(total, "rehearsal", aside)


def decided(settings: Settings) -> tuple[Settings, dict[str, str]]:
    """`settings` with every `auto` resolved by `model/resolve.py`, and the reasons. Raises Refusal."""
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
        length.check(settings)
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
    later = 0

    def learn(memory: "CardMemory") -> None:
        nonlocal later
        later = memory.later.reserved if memory.later is not None else 0
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
        reserved=None if peak.reserved is None else max(peak.reserved, later),
        exhausted=record.allocator.exhausted is not None,
        alternatives=tuple(alternatives),
        unseen=tuple(record.unseen),
        moments=moments_of(record),
        traffic=(None if record.traffic is None else tuple(record.traffic),),
    )


def _highest(candidates: Candidates, ranks: Sequence[Worst]) -> Worst:
    failure = candidates.failure or next((rank.failure for rank in ranks if rank.failure), "")
    if failure:
        return Worst(0, 0, {}, failure)
    worst = max(ranks, key=lambda rank: rank.bytes)
    fullest = max(ranks, key=lambda rank: (rank.exhausted, rank.needs))
    of_allocator = {name: getattr(fullest, name) for name in OF_ALLOCATOR}
    traffic = tuple(moved for rank in ranks for moved in rank.traffic)
    return worst._replace(passed_over=candidates.passed_over, traffic=traffic, **of_allocator)


def _error_text(error: Exception) -> str:
    """The error as text: its class may not exist in the process that receives it. An unexpected one names the file that
    has its traceback.
    """
    if isinstance(error, Refusal):
        return f"{REFUSED}{error}"[:400]
    return tracebacks.sentence(error, 300)


def _of_stage(representatives: "Sequence[Representative]", stage: int) -> "list[Representative]":
    return [representative for representative in representatives if representative.stage == stage]
