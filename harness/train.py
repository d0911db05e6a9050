"""The training run: data, engine, steps, validation, checkpoints."""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness import checkpoint, data, model
from harness.engine import Engine
from harness.ledger import Ledger
from harness.settings import Settings
from harness.world import World

Say = Callable[[str], None]


def run(
    settings: Settings, world: World, ledger: Ledger, directory: Path, say: Say, done: dict[str, Any]
) -> dict[str, Any]:
    """Train, and export the weights to `directory/checkpoint`; the record's `model`, `training` and `performance`.

    `done` is filled as the run goes, so that a run that fails still tells what it did. Raises Refusal.
    """
    began = time.perf_counter()
    train = settings.train
    config = model.model_config(settings.model)
    tokenizer = model.tokenizer(settings.model, settings.data.tokenizer)
    corpus = data.corpus(settings.data, tokenizer, train.sequence, settings.seed, world=world)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    with ledger.phase("setup"):
        built = model.build(settings.model, config, dtype, torch.device("cpu"), settings.seed)
        parameters = model.count(built)
        engine = Engine(settings, world, ledger, built)
    done["model"] = {"name": settings.model.name, "parameters": parameters, "dtype": str(dtype)[6:]}
    done["training"] = training = {"optimizer": engine.optimizer_class, "losses": [], "validation": []}
    first, position = _resume(settings, world, engine, say)
    training["first_step"] = first
    batches = data.loader(corpus.train, train.micro_batch, world, settings.seed, skip=position)
    say(f"{settings.model.name}: {parameters:,} parameters, {engine.optimizer_class}, {world.size} ranks")
    performance = {"startup_seconds": time.perf_counter() - began}
    seconds: list[float] = []
    bar = tqdm(range(first, train.steps), disable=None if world.leads else True, unit="step", leave=False)
    for step in bar:
        started = time.perf_counter()
        loss = _step(engine, batches, step, world)
        _synchronize(world)
        seconds.append(time.perf_counter() - started)
        training["losses"].append(loss)
        rate = train.micro_batch * train.accumulation * train.sequence * world.size / seconds[-1]
        bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s{_peak_line(ledger)}")
        if bar.disable and (step + 1) % max(1, train.steps // 10) == 0:
            say(f"step {step + 1}/{train.steps}  loss {loss:.3f}  {rate:,.0f} tokens/s{_peak_line(ledger)}")
        if _due(step, train.validate_every, train.steps) and corpus.validation is not None:
            held_out = data.loader(corpus.validation, train.micro_batch, world, settings.seed)
            loss = world.mean(engine.evaluate(islice(_on(world, held_out), train.validation_batches), step))
            training["validation"].append({"step": step + 1, "loss": loss})
            say(f"step {step + 1}/{train.steps}  validation loss {loss:.3f}")
        if _due(step, train.save_every, None):
            with ledger.phase("checkpoint", step):
                checkpoint.save(
                    engine, world, directory / "state", step + 1, identity(settings, world), train.keep
                )
    if train.export:
        with ledger.phase("checkpoint", train.steps):
            _export(engine, world, tokenizer, directory / "checkpoint")
    performance.update(_rates(settings, world, seconds, first))
    return {**done, "performance": performance}


def identity(settings: Settings, world: World) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's own."""
    return {
        "world.size": world.size,
        "zero.stage": settings.zero.stage,
        "zero.offload": settings.zero.offload,
        "precision": settings.precision,
        "train.micro_batch": settings.train.micro_batch,
        "train.accumulation": settings.train.accumulation,
        "train.sequence": settings.train.sequence,
        "model": settings.model.path or settings.model.name,
        "seed": settings.seed,
    }


def _resume(settings: Settings, world: World, engine: Engine, say: Say) -> tuple[int, int]:
    """Steps already taken, and micro-batches of this rank already used."""
    if settings.train.resume is None:
        return 0, 0
    found, manifest, passed_over = checkpoint.newest_whole(Path(settings.train.resume))
    for reason in passed_over:
        say(reason)
    steps = checkpoint.load(engine, world, found, manifest, identity(settings, world))
    say(f"resuming after step {steps}, from {found}")
    return steps, steps * settings.train.accumulation


def _step(engine: Engine, batches: Iterator[torch.Tensor], step: int, world: World) -> float:
    """One optimizer step; the loss per token over every micro-batch of every rank."""
    losses = []
    for micro_batch in range(engine.settings.train.accumulation):
        with engine.ledger.phase("data", step, micro_batch):
            tokens = next(batches).to(world.device)
            engine.ledger.claim("inputs", "tokens", tokens)
        losses.append(engine.micro_step(tokens, step, micro_batch))
    engine.apply(step)
    return world.mean(sum(losses) / len(losses))


def _on(world: World, batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tokens in batches:
        yield tokens.to(world.device)


def _export(engine: Engine, world: World, tokenizer: Any, directory: Path) -> None:
    state = engine.full_state()
    if world.leads:
        model.export(engine.module, state, tokenizer, directory)
    world.barrier()


def _due(step: int, every: int, last: int | None) -> bool:
    return bool(every) and ((step + 1) % every == 0 or step + 1 == last)


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _peak_line(ledger: Ledger) -> str:
    peak = ledger.last_peak
    if peak is None:
        return ""
    largest = sorted(((n, b) for n, b in peak.categories.items() if b), key=lambda pair: -pair[1])[:3]
    parts = ", ".join(f"{name} {bytes_ / 2**20:.1f}" for name, bytes_ in largest)
    return f"  peak {peak.bytes / 2**20:.1f} MiB ({parts})"


def _rates(settings: Settings, world: World, seconds: list[float], first: int) -> dict[str, Any]:
    """Tokens a second over all ranks, from the median step; steps under an exact ledger count only if all are."""
    exact = settings.ledger.steps if settings.ledger.mode == "exact" else 1
    timed = seconds[max(0, exact - first) :] or seconds[1:] or seconds
    if not timed:
        return {"tokens_per_second": None, "step_seconds": None}
    train = settings.train
    tokens = train.micro_batch * train.accumulation * train.sequence * world.size
    median = statistics.median(timed)
    return {"tokens_per_second": tokens / median, "step_seconds": median, "steps_timed": len(timed)}
