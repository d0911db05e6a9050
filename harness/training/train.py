"""The training run: data, engine, steps, validation, checkpoints."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from harness.config.load import Refusal, Settings
from harness.config.refusal import as_typed
from harness.config.rules import check_layers, positions
from harness.config.rules.sources import run_state
from harness.data import token_batches
from harness.ledger import Ledger
from harness.ledger.traffic import READ, WRITE
from harness.model import adapter, init_weights, loader, stage, storages
from harness.model.generation_defaults import fields_of
from harness.model.payload import payload
from harness.model.plan import Plan
from harness.model.tokenizer import opens_otherwise, tokenizer_of
from harness.quantization import method
from harness.quantization.method import Quantization
from harness.record.record_file import Output
from harness.record.results import Change, Model
from harness.runtime.course import WHOLE, Course, Stopped
from harness.runtime.files import NotWritten, sweep
from harness.runtime.world import World
from harness.training import checkpoint, fp8, loss_check, nonfinite
from harness.training.engine import Engine, learning_rate
from harness.training.identity import compared, identity
from harness.training.optimizers import import_library
from harness.training.pipeline_engine import Pipeline
from harness.training.progress import Progress, Say
from harness.training.reading import Reported, validation_batches


def prove(plan: Plan, device: str) -> None:
    """Refuse what small models show to be wrong of `plan` on `device` ("cpu" or "cuda"), and import its libraries.

    All of it comes before a ledger counts: it makes tensors that are no part of a run.
    """
    loss_check.prove(plan, device)
    fp8.prove(plan, device)
    import_library(plan.settings)
    adapter.prove(plan)


def run(plan: Plan, world: World, ledger: Ledger, out: Output, course: Course = WHOLE) -> None:
    """Train, and export the weights to `checkpoint/` in the run's directory. Raises Refusal."""
    start = time.perf_counter()
    settings, config = plan.settings, plan.config
    train = settings.train
    positions.check(settings, config.to_dict())  # with the defaults that config.json leaves out
    tokenizer = tokenizer_of(settings.model, config, settings.data.tokenizer)
    generation = fields_of(settings.model, config)
    corpus = token_batches.corpus(settings.data, tokenizer, train.sequence, world, course.values)
    validation = validation_batches(settings, world, ledger, corpus)
    if (train.save_every or train.save_on_term) and course.values:
        checkpoint.check_free(out.directory)
    own = identity(plan, world, tokenizer, corpus) if course.values else {}
    resumed = _found(settings, own, out.say)
    dtype = getattr(torch, settings.dtype)
    quantization = method.take(config, settings, "cpu")
    with ledger.phase("setup"):
        engine, out.results.model = _engine(plan, config, dtype, world, ledger, quantization, course)
    first = _resume(resumed, world, engine, out.say)
    spans = train.micro_batch, world, settings.seed, first * train.accumulation, train.accumulation
    batches = Reported(token_batches.loader(corpus.train, *spans), ledger)
    counted = out.results.model.counted
    out.say(f"{settings.model.name}: {counted}, {engine.optimizer_class}, {world.size} ranks")
    if corpus.cut:
        out.say(
            f"{corpus.cut:,} tokens of documents are beyond train.sequence={train.sequence}, and left out"
        )
    progress = Progress(settings, world, ledger, first, out.say, time.perf_counter() - start, course)
    progress.training = progress.training.plus(optimizer=engine.optimizer_class)
    if corpus.cut is not None:
        progress.training = progress.training.plus(cut_tokens=corpus.cut)
    if resumed is not None:
        progress.training = progress.training.plus(changes=resumed.changes, unknown=resumed.unknown)
    out.results.training = progress.training
    out.trackers.start()
    ledger.recent.take()  # the set-up
    for step in progress:
        ledger.begins(step)
        loss = engine.train_step(batches, step)
        if engine.guard.skipped:
            if train.nonfinite == "stop":
                _stop(engine, world, settings, corpus, step, loss)
            progress.skipped(step, loss)
        progress.stepped(loss, batches.shares)
        batches.shares.clear()
        if out.trackers:
            rates = {
                "train/learning_rate": learning_rate(train, step),
                "train/grad_norm": engine.gradient_norm,
            }
            out.trackers.log(step + 1, {**progress.figures(), **rates})
        if validation is not None and _due(step, train.validate_every, train.steps):
            loss = engine.evaluate(validation(), step)
            progress.validated(step, loss)
            out.trackers.log(step + 1, {"validation/loss": loss})
        if _due(step, max(1, train.steps // 10), first + settings.ledger.steps):
            out.results.training = progress.counted()
            out.flush()
        saved = False
        if _due(step, train.save_every, None):
            problem = _save(engine, world, out.directory, step, own, course.values)
            if problem is not None:  # the run can go on
                out.results.training = progress.unsaved(step, str(problem))
                out.flush()
            saved = problem is None
        if out.stops_after(step) and step + 1 < train.steps:
            if not saved and (problem := _save(engine, world, out.directory, step, own, course.values)):
                raise problem
            raise Stopped(f"its state after step {step + 1} is saved")
    if not progress.whole:
        ledger.enough()  # the next step would do this; do it before anything is freed
    if course.values:
        out.results.training = progress.counted()
        out.results.performance = progress.rates()
    if train.export and progress.whole:
        with ledger.phase("checkpoint", train.steps):
            _export(plan, engine, world, tokenizer, generation, out, course.values)


def _engine(
    plan: Plan,
    config: PretrainedConfig,
    dtype: torch.dtype,
    world: World,
    ledger: Ledger,
    quantization: Quantization | None,
    course: Course,
) -> tuple[Engine | Pipeline, Model]:
    """The DeepSpeed engine for this rank's part of the model, and the record of the whole model.

    `course` says whether its weights are read, if it has any stored, and what compiles its layers, if they are.
    """
    settings, read = plan.settings, course.values
    check_layers(settings.checkpointing, plan.number_of_layers)
    spec, options = (settings.model, config, dtype, torch.device("cpu"), settings.seed), (None, quantization)
    if world.stages == 1:
        model = loader.build(*spec, read, *options)
        packs = quantization if quantization is not None and quantization.trained else None
        stored = init_weights.outline(config, dtype) if packs else model
        ledger.traffic.report(READ, payload(settings.model, dict(stored.named_parameters()), read))
        if adapter.wanted(settings):
            whole = adapter.outline(settings, config, dtype)
            ledger.traffic.report(READ, adapter.apply(settings, model, whole, read))
        # before ZeRO-3 empties the parameters
        record = (
            loader.sizes(settings.model, whole, dtype).plus(
                quantization=packs.as_record(storages.nbytes(model))
            )
            if packs
            else loader.sizes(settings.model, model, dtype, quantization)
        )
        record = fp8.sized(settings, adapter.sized(settings, record, model), model)
        compiler = course.compiler if settings.train.compile else None
        return Engine(settings, world, ledger, model, compiler), record
    part = stage.build(*spec, plan.layers[world.stage], read, *options)
    ledger.traffic.report(READ, payload(settings.model, part.owned(), read))
    whole = adapter.outline(settings, config, dtype)
    ledger.traffic.report(READ, adapter.apply(settings, part, whole, read))
    record = adapter.sized(settings, loader.sizes(settings.model, whole, dtype, quantization), whole)
    record = fp8.sized(settings, record, whole)
    return Pipeline(settings, world, ledger, part, whole, plan.split), record


class Resumed(NamedTuple):
    """A checkpoint to go on from: its directory, its manifest, and how this run differs from the one that saved it."""

    directory: Path
    manifest: dict[str, Any]
    changes: list[Change]
    unknown: list[str]


def _found(settings: Settings, own: Mapping[str, Any], say: Say) -> Resumed | None:
    """The newest complete checkpoint of `train.resume`, if there is one to resume from. `own` is this run's identity.

    Raises Refusal where there is none, or it is of another run.
    """
    train = settings.train
    if train.resume is None:
        return None
    run = Path(train.resume)
    sweep(run)
    sweep(run_state(run))
    directory, manifest, corrupt = checkpoint.newest_whole(run)
    for reason in corrupt:
        say(reason)
    changes, unknown = compared(manifest["identity"], own, train.resume_changes, directory)
    for each in changes:
        say(f"{each.key} is {as_typed(each.value)}, and was {as_typed(each.saved)} in {directory}")
    if unknown:
        say(f"{directory} does not say whether these were the same: {', '.join(unknown)}")
    if manifest["step"] >= train.steps:
        remedy = f"{directory} already has {manifest['step']} steps; ask for more in all"
        raise Refusal("train.steps", train.steps, remedy)
    return Resumed(directory, manifest, changes, unknown)


def _resume(resumed: Resumed | None, world: World, engine: Engine | Pipeline, say: Say) -> int:
    """Load the state to resume from, if any; return the number of completed steps."""
    if resumed is None:
        return 0
    with engine.ledger.phase("checkpoint"):
        steps = checkpoint.load(engine, world, resumed.directory, resumed.manifest)
    if engine.ledger.steps is not None:
        engine.ledger.steps += steps  # count from the first step of this run
    say(f"resuming after step {steps}, from {resumed.directory}")
    return steps


def _save(
    engine: Engine | Pipeline, world: World, directory: Path, step: int, own: Mapping[str, Any], write: bool
) -> NotWritten | checkpoint.NotFinite | None:
    """Save the state after `step`. Returns why it is not saved, on every rank, within the phase: to the ledger an error
    that leaves a phase is where the run failed. Raises NotFinite where `train.nonfinite=stop`; it is the failure of the
    rank whose weights are not finite.
    """
    with engine.ledger.phase("checkpoint", step):
        train = engine.settings.train
        try:
            checkpoint.save(engine, world, directory / "state", step + 1, own, train.keep, write)
        except NotWritten as problem:
            return problem
        except checkpoint.NotFinite as problem:
            if train.nonfinite != "stop":
                return problem
            if problem.rank != world.rank:
                world.barrier()  # until that rank has ended
            raise
    return None


def _stop(
    engine: Engine | Pipeline,
    world: World,
    settings: Settings,
    corpus: token_batches.Corpus,
    step: int,
    loss: float,
) -> NoReturn:
    """End a run in whose `step` a loss or gradient is not finite. Raises FloatingPointError on the rank where it began,
    which reports it for all.
    """
    engine.ledger.enough()  # what follows is no part of the run
    train = settings.train
    skip = step * train.accumulation
    spans = train.micro_batch, world, settings.seed, skip, train.accumulation
    batches = token_batches.loader(corpus.train, *spans)
    searched = engine.not_finite_in(batches, step)
    rank, micro_batch, phase, sentence = nonfinite.origin(searched, loss, world)
    with engine.ledger.phase(phase, step, micro_batch):
        if rank == world.rank:
            raise FloatingPointError(f"{sentence}; the update was left out, and train.nonfinite=skip goes on")
        world.barrier()  # until that rank has ended
    raise FloatingPointError(sentence)


def _export(
    plan: Plan,
    engine: Engine | Pipeline,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    generation: Mapping[str, Any],
    out: Output,
    write: bool,
) -> None:
    state = engine.full_state()
    model, state = adapter.to_export(plan, engine.whole, state)
    engine.ledger.traffic.report(WRITE, {name: tensor.nbytes for name, tensor in (state or {}).items()})
    if world.leads and write:
        directory = out.directory / "checkpoint"
        loader.export(model, state, tokenizer, generation, directory)
        if warning := opens_otherwise(directory, tokenizer):
            out.say(f"checkpoint/: {warning}")
    world.barrier()


def _due(step: int, every: int, last: int | None) -> bool:
    return bool(every) and ((step + 1) % every == 0 or step + 1 == last)
