"""One run from settings to record: the world is joined, the directory made, the mode run, the books written."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from harness.analysis.summary import decided, show
from harness.config import hardware_page
from harness.config.load import Refusal, Settings
from harness.config.rules import check_world
from harness.ledger import Ledger
from harness.model.resolve import Resolved, resolve
from harness.record import phase_times, record_file, trace
from harness.runtime import failure, launcher, memory_snapshot, peak_rates, world
from harness.runtime.world import World

T = TypeVar("T")


def run(settings: Settings, cfg: DictConfig, words: list[str]) -> int:
    """Carry out `settings`; the exit code. `words` are what was typed, for the sentences that repeat them.

    Raises Refusal for what only a joined world can refuse.
    """
    if settings.world.kind == "rehearsed":
        return _rehearse(settings, cfg, words)
    _, size, _ = world.environment()
    check_world(settings, size, words)
    parts = settings.pipeline.stages, settings.tensor_parallel
    with world.connected(settings.hardware.device, settings.world.timeout, *parts) as here:
        memory_snapshot.check(settings, here.device)
        resolved = _by_rank_0(here, lambda: resolve(settings, here.device.type))
        directory = _by_rank_0(here, lambda: _make_directory(resolved.settings, cfg))
        return _Run(resolved, words, here, directory).carry_out()


def _by_rank_0(here: World, decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank. Raises Refusal, on every rank, where it does."""
    outcome: Any = None
    if here.leads:
        try:
            outcome = decide()
        except Refusal as refusal:
            outcome = refusal
    outcome = here.broadcast(outcome)
    if isinstance(outcome, Refusal):
        raise outcome
    return cast(T, outcome)


def _rehearse(settings: Settings, cfg: DictConfig, words: list[str]) -> int:
    """The same, with no world: every role in a process of its own, and one record of them all."""
    from harness.rehearsal import all_ranks as rehearsal

    if world.environment()[1] > 1:
        raise Refusal("world", "rehearsed", "one process rehearses any world; start it without torchrun")
    assert settings.world.size is not None
    check_world(settings, settings.world.size)
    resolved = resolve(settings)
    settings = resolved.settings
    made = _make_directory(settings, cfg)
    head = record_file.head(settings, resolved.reasons, words, rehearsal.described(settings))
    for line in decided(resolved.reasons):
        print(line)
    record_file.write(made, {**head, "failure": failure.UNFINISHED, "ranks": []})
    try:
        ranks, done = rehearsal.rehearse(settings, made)
    except Refusal:
        _remove(made)
        raise
    except Exception as error:
        found = failure.of_rehearsal(error, made)
        record_file.write(made, {**head, "failure": found.as_record(), "ranks": []})
        print(f"harness: {found.sentence()}", file=sys.stderr, flush=True)
        return 3
    head["world"]["differences"] += rehearsal.of_packing(done["model"])
    done["ceilings"] = hardware_page.ceilings(settings.hardware, done["model"]["dtype"])
    record_file.write(made, {**head, "status": "complete", **done, "ranks": ranks})
    _say_where(made, print)
    return 0


def _say_where(directory: Path, say: Callable[[str], object]) -> None:
    say(show(record_file.read(directory)))
    say(f"record: {directory / record_file.FILE}")


def _remove(directory: Path, heard: bool = True) -> None:
    """A refused run leaves nothing, but the reason where a rank may not have `heard` it."""
    for name in (record_file.FILE, "config.yaml", *([failure.CLAIM] if heard else [])):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


def _make_directory(settings: Settings, cfg: DictConfig) -> Path:
    """The run's own directory with its config in it. Raises Refusal where one is already there."""
    asked = OmegaConf.select(cfg, "hydra.run.dir")
    stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    directory = Path(asked or f"outputs/{stamp}-{settings.mode}").absolute()
    if (directory / record_file.FILE).exists():
        raise Refusal("hydra.run.dir", directory, "it already holds a run's record; name another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / failure.CLAIM).unlink(missing_ok=True)  # of a run that was refused
        partial = directory / ".config.yaml.partial"
        partial.write_text(OmegaConf.to_yaml(asdict(settings)), encoding="utf-8")
        os.replace(partial, directory / "config.yaml")
    except OSError as error:
        raise Refusal("hydra.run.dir", directory, f"it cannot be written: {error.strerror}") from error
    return directory


class _Run:
    """One rank's part of a run: what it knows of itself, and how it ends."""

    def __init__(self, resolved: Resolved, words: list[str], here: World, directory: Path) -> None:
        self.settings, self.world, self.directory = resolved.settings, here, directory
        settings = resolved.settings
        self.ledger = Ledger(
            mode=settings.ledger.mode,
            steps=settings.ledger.steps,
            settle_collectives=here.size > 1 and here.device.type == "cpu",
            device=here.device.type,
        )
        self.ending = threading.Lock()
        self.done: dict[str, Any] = {}
        around = {"size": here.size, "device": here.device.type, "device_name": here.device_name}
        self.head = record_file.head(
            settings, resolved.reasons, words, {"kind": settings.world.kind, **around}
        )
        for line in decided(resolved.reasons):
            self.say(line)

    def carry_out(self) -> int:
        """Run the mode; the exit code. Raises Refusal on rank 0; elsewhere it waits for rank 0 to say it first."""
        failure.await_termination(lambda: self._fail(lambda: failure.peer_lost(self.directory, self.world)))
        if self.world.leads:
            self._write([], failure=failure.UNFINISHED)
        try:
            ranks = self.world.gather(self._run_mode())
            self._bounds()
        except Refusal as refusal:
            return self._refused(refusal)
        except BaseException as error:  # whatever it was, the record says so before this process ends
            where = self.ledger.where
            return self._fail(partial(failure.of, error, where, self.directory, self.world))
        if self.world.leads:
            self._write(ranks, status="complete")
            _say_where(self.directory, self.say)
        return 0

    def _run_mode(self) -> dict[str, Any]:
        """The mode's own run under the ledger; this rank's books."""
        from harness.generation.cache_check import prove
        from harness.model.misfit import misfits
        from harness.runtime.memory_limit import allocations

        if self.settings.mode == "train":
            from harness.training import train as mode
        else:
            from harness.generation import infer as mode  # type: ignore[no-redef]
        prove(self.settings)
        if self.world.stages > 1:
            self._cut()
        settings = self.settings
        with misfits(settings), allocations(settings, self.world.device), self._snapshot(), self.ledger:
            out = record_file.Output(self.directory, self.say, self.done, self.flush)
            mode.run(settings, self.world, self.ledger, out)
        self._trace()
        return self._books()

    def _bounds(self) -> None:
        """What phases took, and what the machine could do at most, by every rank."""
        took = self.world.gather(self.ledger.seconds())
        self.done.setdefault("performance", {})["phases"] = phase_times.of_ranks(
            took, self.settings.ledger.mode
        )
        dtype = self.done["model"]["dtype"]
        found = hardware_page.ceilings(self.settings.hardware, dtype)
        if found is None:
            rates = peak_rates.measure(self.world.device, getattr(torch, dtype))
            found = peak_rates.of_ranks(self.world.gather(rates), dtype)
        self.done["ceilings"] = found

    def _cut(self) -> None:
        """Decide which layers each stage has, and see that the stages are the whole. Raises Refusal, on every rank."""
        from harness.model import partition
        from harness.model.loader import model_config
        from harness.model.stage_check import prove

        found = _by_rank_0(self.world, self._split)
        self.settings = replace(self.settings, pipeline=replace(self.settings.pipeline, split=found))
        prove(self.settings)
        layers = partition.split_of(self.settings, model_config(self.settings.model))
        self.done["pipeline"] = partition.as_record(self.settings, layers)

    def _split(self) -> Any:
        """The settings' split; a list where they ask for one by `memory`. Raises Refusal."""
        from harness.rehearsal.all_ranks import balanced

        settings, here = self.settings, self.world
        device = replace(settings.hardware, device="cuda" if here.kind == "cuda" else "cpu")
        around = replace(settings.world, kind="rehearsed", size=here.size)
        return balanced(replace(settings, world=around, hardware=device)).pipeline.split

    def _books(self) -> dict[str, Any]:
        return record_file.rank_record(self.ledger, self.world.rank, self.world.stage, self.world.share)

    def _snapshot(self) -> AbstractContextManager[None]:
        if self.settings.ledger.snapshot:
            return memory_snapshot.kept(self.directory, self.world.rank)
        return nullcontext()

    def _trace(self) -> None:
        if self.settings.ledger.trace:
            trace.write(self.directory, self.world.rank, trace.of_ledger(self.ledger))

    def say(self, line: str) -> None:
        """Rank 0 speaks."""
        if self.world.leads:
            tqdm.write(line, file=sys.stdout)

    def flush(self) -> None:
        """Leave what is known so far, for a run that is ended from outside and cannot say why."""
        if self.world.leads:
            unfinished = {**failure.UNFINISHED, "where": self.ledger.where._asdict()}
            self._write([self._books()], failure=unfinished)

    def _write(self, ranks: list[dict[str, Any]], **more: Any) -> None:
        record_file.write(self.directory, {**self.head, **more, **self.done, "ranks": ranks})

    def _refused(self, refusal: Refusal) -> int:
        """Let one rank say it for all. Raises it where there is no other."""
        if self.world.size == 1:
            _remove(self.directory)
            raise refusal
        self.ending.acquire()  # never released: the thread that notices second waits for the end
        rank = self.world.rank
        if not self.world.leads:
            failure.await_word(self.directory)  # rank 0 has most likely found the same
        sentence = str(refusal) if self.world.leads else f"rank {rank}: {refusal}"
        word = failure.Word(rank, sentence, 2)
        first = failure.claim(self.directory, word)
        self._end(word if first else None)

    def _fail(self, find: Callable[[], failure.Failure | None]) -> int:
        """Leave a record that says what failed, unless the rank that failed first has left one; then end at once."""
        self.ending.acquire()
        found = find()  # patiently, so it comes after
        word = None if found is None else failure.Word(found.rank, found.sentence(), 3)
        if found is None or word is None or not failure.claim(self.directory, word):
            self._end(None)
        books = self._books() if found.rank == self.world.rank else None
        with suppress(OSError):
            self._write([books] if books else [], failure=found.as_record())
            if books:
                self._trace()
        self._end(word)

    def _end(self, own: failure.Word | None) -> NoReturn:
        """End at once, with this rank's `own` word, or that of another which was first.

        The others are gone or going: leaving in good order would wait for them.
        """
        word = own or failure.first_word(self.directory)
        if own:
            print(f"harness: {own.sentence}", file=sys.stderr, flush=True)
        if word:
            launcher.tell(word.sentence)
        code = word.code if word else 2  # nothing is left of a run that was refused
        if code == 2 and self.world.leads:
            _remove(self.directory, failure.end_others(self.world))
        sys.stdout.flush()
        os._exit(code)
