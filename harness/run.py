"""One run from settings to record: join the world, create the directory, run the mode, write the record."""

import errno
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from harness.analysis.summary import decided, out_of_memory, show
from harness.config.load import Refusal, Settings
from harness.config.rules import check_world
from harness.config.settings import as_typed
from harness.device.workspaces import of_this_gpu
from harness.ledger import Ledger, Where
from harness.model.plan import Plan
from harness.model.resolve import resolve
from harness.record import ceilings, figures, phase_times, record_file, trace
from harness.record.fields import flat
from harness.record.links import nodes_of
from harness.record.live import LiveRecord
from harness.record.memory import Rank
from harness.record.results import Performance, Results
from harness.record.schema import Record
from harness.record.schema import World as WorldRecord
from harness.runtime import ending, failure, faults, memory_snapshot, peak_rates, world
from harness.runtime.course import Stopped
from harness.runtime.ending import Ending
from harness.runtime.files import NO_ROOM, NotWritten, put, sweep
from harness.runtime.trackers import Trackers
from harness.runtime.watcher import Watcher
from harness.runtime.world import World
from harness.training import deepspeed_config

T = TypeVar("T")

PLACES = ("state", "checkpoint", trace.DIRECTORY, "tensorboard", "wandb", "mlflow", "mlflow.db")
"""What a run and its trackers write into by its name, and would follow if it were a link. Other files are replaced."""

Reasons = Callable[[Settings], Mapping[str, str]]
Say = Callable[[int, str, int], object]


def run(
    settings: Settings, cfg: DictConfig, overrides: list[str], reasons: Reasons, watcher: Watcher, place: Say
) -> int:
    """Carry out `settings` and return the exit code. `overrides` is the command line, which messages repeat.

    `reasons` are those of values that were chosen before, by key. The `watcher` has begun; `place` says to the other
    ranks of this host where this one is.

    Raises Refusal for problems that only a joined world can detect.
    """
    if settings.world.kind == "rehearsed":
        return _rehearse(settings, cfg, overrides, reasons)
    _, size, _ = world.environment()
    check_world(settings, size, overrides)
    end = Ending()
    watcher.on_signal, watcher.on_launcher_gone = end.on_signal, end.on_launcher_gone
    watcher.now_and_then = end.on_peer_gone
    try:
        return _joined(settings, cfg, overrides, reasons, Company(watcher, end, place))
    except Refusal:
        raise
    except Exception as error:
        if size == 1:
            raise
        end.before_directory(error)


class Company(NamedTuple):
    """What a rank has to do with others: it watches them, ends with them, and says its place."""

    watcher: Watcher
    end: Ending
    place: Say


def _joined(
    settings: Settings, cfg: DictConfig, overrides: list[str], reasons: Reasons, company: Company
) -> int:
    """Meet the other ranks, and carry out `settings` in a directory of all."""
    group_sizes = settings.pipeline.stages, settings.tensor_parallel
    faults.at("connect")
    with world.connected(settings.hardware.device, settings.world.timeout, *group_sizes) as joined_world:
        company.end.world = joined_world
        memory_snapshot.check(settings, joined_world.device)
        plan = _by_rank_0(joined_world, lambda: resolve(settings, joined_world.device.type))
        plan = replace(plan, reasons={**reasons(plan.settings), **plan.reasons})
        faults.at("directory")
        head = record_file.head(
            plan.settings, plan.reasons, overrides, _described(plan.settings, joined_world)
        )
        directory = _by_rank_0(
            joined_world, lambda: _make_directory(plan.settings, cfg, joined_world.dp_size, head)
        )
        return _Run(plan, head, joined_world, directory, company).carry_out()


def _described(settings: Settings, joined_world: World) -> WorldRecord:
    """The record's `world`."""
    device = joined_world.device.type
    return WorldRecord(
        kind=settings.world.kind,
        size=joined_world.size,
        device=device,
        device_name=joined_world.device_name,
    )


def _by_rank_0(joined_world: World, decide: Callable[[], T]) -> T:
    """Rank 0's result of `decide`, on every rank. If it raises Refusal or NotWritten, every rank raises it; but of
    what could not be written rank 0 says it.
    """
    outcome: Any = None
    if joined_world.leads:
        try:
            outcome = decide()
        except (Refusal, NotWritten) as error:
            outcome = error
    outcome = joined_world.broadcast(outcome)
    if isinstance(outcome, NotWritten) and not joined_world.leads:
        joined_world.barrier()  # until rank 0 has ended
    if isinstance(outcome, (Refusal, NotWritten)):
        raise outcome
    return cast(T, outcome)


def _rehearse(settings: Settings, cfg: DictConfig, command: list[str], reasons: Reasons) -> int:
    """Rehearse `settings` without a world: each representative rank in its own process, and one record of all."""
    from harness.rehearsal import all_ranks as rehearsal

    if world.environment()[1] > 1:
        raise Refusal("world", "rehearsed", "one process rehearses any world; start it without torchrun")
    assert settings.world.size is not None
    check_world(settings, settings.world.size)
    plan = resolve(settings)
    plan = replace(plan, reasons={**reasons(plan.settings), **plan.reasons})
    head = record_file.head(plan.settings, plan.reasons, command, rehearsal.described(plan))
    directory = _make_directory(plan.settings, cfg, plan.layout.dp_size, head)
    for line in decided(plan.reasons):
        print(line)
    try:
        ranks, results = rehearsal.rehearse(plan, directory)
        record = rehearsal.whole(head, ranks, results)
        limits = ceilings.of_page(plan.settings.hardware, record.model.multiplied)
        record_file.write(directory, record.plus(ceilings=limits))
    except Refusal:
        _remove(directory)
        raise
    except Exception as error:
        rank_failure = failure.of_rehearsal(error, directory)
        with suppress(OSError):  # a full disk must not hide the failure
            record_file.write(directory, head.plus(failure=record_file.failure_record(rank_failure)))
        print(f"harness: {rank_failure.sentence()}", file=sys.stderr, flush=True)
        return 3
    _print_summary(directory, print)
    return 0


def _print_summary(directory: Path, say: Callable[[str], object]) -> None:
    say(show(record_file.read(directory)))
    say(f"record: {directory / record_file.FILE}")


def _remove(directory: Path, reason_received: bool = True) -> None:
    """Delete the files of a refused run, which owns `directory`. Keep the reason unless every rank has received it."""
    for name in (
        "config.yaml",
        deepspeed_config.FILE,
        *([failure.CLAIM] if reason_received else []),
        record_file.FILE,  # last: from then on the directory may be another run's
    ):
        with suppress(OSError):
            (directory / name).unlink()
    with suppress(OSError):
        directory.rmdir()


def _make_directory(settings: Settings, cfg: DictConfig, dp_size: int, head: Record) -> Path:
    """The run's own directory, with its first record and its config, and DeepSpeed's.

    Of several runs that ask for a directory at once, one gets it. Raises Refusal where it has a record already or
    cannot be made, and NotWritten where the disk is full.
    """
    configured = OmegaConf.select(cfg, "hydra.run.dir")
    stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    directory = Path(configured or f"outputs/{stamp}-{settings.mode}").absolute()
    for name in PLACES:
        if (directory / name).is_symlink():
            problem = f"its {name} is a link, and a run writes nothing outside its directory; remove the link, or let "
            raise Refusal("hydra.run.dir", directory, f"{problem}hydra.run.dir itself lead to another disk")
    if not _claim(directory, head):
        problem = "it already contains a run's record; name another directory"
        raise Refusal("hydra.run.dir", directory, problem)
    try:
        (directory / failure.CLAIM).unlink(missing_ok=True)  # from a refused run
        sweep(directory)
        sweep(directory / "state")
        put(directory / "config.yaml", OmegaConf.to_yaml(asdict(settings)))
        if settings.mode == "train":
            whole = deepspeed_config.whole_config(settings, dp_size)
            put(directory / deepspeed_config.FILE, json.dumps(whole, indent=2) + "\n")
    except OSError as error:
        _remove(directory)
        raise _unwritable(directory, error) from error
    return directory


def _claim(directory: Path, head: Record) -> bool:
    """Whether `directory` is this run's: the run that creates its record has it. Raises Refusal and NotWritten."""
    first = head.plus(failure=record_file.unfinished())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            return record_file.begin(directory, first)
        except NotWritten as error:
            if error.errno != errno.ENOENT:
                raise
        directory.mkdir(parents=True, exist_ok=True)  # a run that was refused has removed it meanwhile
        return record_file.begin(directory, first)
    except OSError as error:
        with suppress(OSError):
            directory.rmdir()
        raise _unwritable(directory, error) from error


def _unwritable(directory: Path, error: OSError) -> Exception:
    """What to raise: where the disk is full another directory may be no remedy, so that is no wrong request."""
    if isinstance(error, NotWritten) and error.errno in NO_ROOM:
        return error
    return Refusal("hydra.run.dir", directory, f"it cannot be written: {error.strerror}")


def _hyperparameter(value: Any) -> bool | float | str:
    """A setting for trackers: what is no number and no text as it is typed."""
    return value if isinstance(value, (bool, int, float, str)) else as_typed(value)


class _Run:
    """One rank's part of a run: its settings, ledger and results, and how it ends."""

    def __init__(
        self, plan: Plan, head: Record, joined_world: World, directory: Path, company: Company
    ) -> None:
        self.plan, self.head, self.world, self.directory = plan, head, joined_world, directory
        self.company = company
        settings = plan.settings
        self.ledger = Ledger(
            mode=settings.ledger.mode,
            steps=settings.ledger.steps,
            settle_collectives=joined_world.device.type == "cpu",
            device=joined_world.device.type,
            libraries=of_this_gpu() if joined_world.device.type == "cuda" else None,
        )
        self.ledger.on_phase = self._enter
        self.last_phase: Where | None = None
        self.results = Results()
        self.record = LiveRecord(directory)
        self.behind = False  # the record on disk is older than it should be
        self.trackers = self._trackers()
        for line in decided(plan.reasons):
            self.say(line)

    @property
    def settings(self) -> Settings:
        """The plan's settings."""
        return self.plan.settings

    def carry_out(self) -> int:
        """Run the mode and return the exit code.

        Raises Refusal if this is the only rank. With several ranks, one of them reports it and all exit.
        """
        end = self.company.end
        end.directory, end.where, end.leave = self.directory, lambda: self.where, self._leave
        if self.world.leads:
            self.record.begun(self.head.plus(failure=record_file.unfinished()))
        end.write = self._write_failure
        end.saves = self.settings.mode == "train" and self.settings.train.save_on_term
        self.company.watcher.now_and_then = self._note_place
        faults.at("start")
        try:
            ranks = self.world.gather(self._run_mode())
            self._measure_limits()
            if self.world.leads:
                self._write(ranks, last=True, status="complete")
            self.world.barrier()  # no rank ends well before the record is there
        except Refusal as refusal:
            if self.world.size == 1:
                self.trackers.fail(str(refusal))
                _remove(self.directory)
                raise
            end.refuse(refusal)
        except Stopped as stopped:
            error = f"ended by {end.asked or 'a signal to another rank'}; {stopped}"
            outside = partial(failure.outside, error, self.where, self.directory, self.world)
            end.fail(outside, ending.AGAIN, stopped)
        except BaseException as error:  # the record has any error before this process ends
            end.fail(partial(failure.of, error, self.where, self.directory, self.world), error=error)
        if self.world.leads:
            self.trackers.finish(figures.of_run(ranks, self.results))
            _print_summary(self.directory, self.say)
        return 0

    def _run_mode(self) -> Rank:
        """Run the mode under the ledger and return this rank's record."""
        from harness.generation import cache_check
        from harness.model.misfit import misfits
        from harness.runtime.memory_limit import allocations

        if self.settings.mode == "train":
            from harness.training import train as mode
        else:
            from harness.generation import infer as mode  # type: ignore[no-redef]
        if self.world.stages > 1:
            self._partition()
        cache_check.prove(self.plan)
        mode.prove(self.plan, self.world.kind)
        settings = self.settings
        with (
            misfits(self.plan),
            allocations(settings, self.world.device),
            self._memory_snapshot(),
            self.ledger,
        ):
            out = record_file.Output(
                self.directory, self.say, self.results, self.flush, self.trackers, self._stops_after
            )
            mode.run(self.plan, self.world, self.ledger, out)
        self._write_trace()
        return self._rank_record()

    def _measure_limits(self) -> None:
        """Seconds of the phases over all ranks, and the limits of the machine."""
        times = self.world.gather(self.ledger.seconds())
        results, phases = self.results, phase_times.of_ranks(times, self.settings.ledger.mode)
        results.performance = (results.performance or Performance()).plus(phases=phases)
        assert results.model is not None
        dtype = results.model.multiplied
        results.ceilings = ceilings.of_page(self.settings.hardware, dtype)
        if results.ceilings is None:
            rates = peak_rates.measure(self.world.device, getattr(torch, dtype))
            results.ceilings = ceilings.of_ranks(self.world.gather(rates), dtype)

    def _partition(self) -> None:
        """Choose the layers of each stage, and check that the stages equal the whole model.

        Raises Refusal, on every rank.
        """
        from harness.model import partition
        from harness.model.stage_check import prove

        split = _by_rank_0(self.world, self._chosen_split)
        self.plan = self.plan.with_settings(pipeline=replace(self.settings.pipeline, split=split))
        prove(self.plan)
        self.results.pipeline = partition.as_record(self.settings, self.plan.split)

    def _chosen_split(self) -> Any:
        """The split of the settings; for `memory`, a list that balances it. Raises Refusal."""
        from harness.rehearsal.all_ranks import balanced

        settings, joined_world = self.settings, self.world
        device = replace(settings.hardware, device="cuda" if joined_world.kind == "cuda" else "cpu")
        rehearsed_world = replace(settings.world, kind="rehearsed", size=joined_world.size)
        rehearsed = self.plan.with_settings(world=rehearsed_world, hardware=device)
        return balanced(rehearsed).settings.pipeline.split

    def _rank_record(self) -> Rank:
        world = self.world
        nodes = nodes_of(self.settings, world.kind, world.device_name)
        return record_file.rank_record(self.ledger, world.rank, world.stage, world.tp_rank, nodes)

    def _memory_snapshot(self) -> AbstractContextManager[None]:
        if self.settings.ledger.snapshot:
            return memory_snapshot.kept(self.directory, self.world.rank)
        return nullcontext()

    def _write_trace(self) -> None:
        if self.settings.ledger.trace:
            trace.write(self.directory, self.world.rank, trace.of_ledger(self.ledger))

    def _trackers(self) -> Trackers:
        """The trackers of rank 0; none on another rank."""
        if not self.world.leads:
            return Trackers()
        values = {key: _hyperparameter(value) for key, value in flat(asdict(self.settings))}
        values["world.size"] = self.world.size
        title = f"{self.settings.mode} {self.head.model.short}"
        return Trackers(self.settings.tracker, self.directory, self.say, title, values)

    def say(self, line: str) -> None:
        """Print `line`, on rank 0."""
        if self.world.leads:
            tqdm.write(line, file=sys.stdout)

    def flush(self) -> None:
        """Write the record so far, in case the run is killed and cannot report why.

        Where it cannot be written the run goes on, says so once, and tries at the next time.
        """
        if not self.world.leads:
            return
        try:
            self._write([self._rank_record()], failure=record_file.unfinished(self.where))
            self.behind = False
        except NotWritten as problem:
            if not self.behind:
                self.say(f"the record is as it was, and the run goes on: {problem}")
            self.behind = True

    def _write(self, ranks: list[Rank], last: bool = False, **more: Any) -> None:
        self.record.write(self.head.plus(**more, **self.results.parts, ranks=ranks), last)

    @property
    def where(self) -> Where:
        """The phase that is running or has failed; between two phases the one before."""
        where = self.ledger.where
        return self.last_phase or where if where.phase == "idle" else where

    def _enter(self, where: Where) -> None:
        self.last_phase = where
        self.company.place(*where)

    def _note_place(self) -> None:
        """In the watcher's thread: keep the place in the record, in case the run is killed."""
        if self.world.leads and self.last_phase is not None:
            self.record.note(record_file.unfinished(self.where))

    def _stops_after(self, step: int) -> bool:
        """Whether all ranks save and end after `step`, because a signal has asked one of them to."""
        end = self.company.end
        return end.saves and self.world.stops_after(step, end.asked is not None)

    def _write_failure(self, rank_failure: failure.Failure) -> list[str]:
        """Write the record of a failure, with this rank's figures where they can be had, and its trace.

        Returns what is printed below its sentence.
        """
        ranks = []
        with suppress(Exception):  # no figure that cannot be may hide the failure
            ranks = [self._rank_record()]
        own = ranks[0] if ranks and rank_failure.rank == self.world.rank else None
        described = record_file.failure_record(rank_failure, own)
        self._write(ranks, last=True, failure=described)
        if own is not None:
            self._write_trace()
        return [*out_of_memory(described, self.directory)]

    def _leave(self, report: failure.Report, own: bool) -> None:
        """Before this process exits: trackers have the failure, and a refused run leaves no file."""
        self.trackers.fail(report.sentence)
        if report.code == 2 and self.world.leads:
            _remove(self.directory, failure.end_others(self.world))
