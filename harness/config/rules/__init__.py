"""The rules between fields. Each rule raises a Refusal with its own sentence."""

import os
from collections.abc import Sequence

from harness.config.resume import check_changes
from harness.config.rules import (
    adapter,
    compiled,
    data,
    fp8,
    in_backward,
    loss,
    optimizer,
    packages,
    positions,
    quantized,
    widths,
)
from harness.config.rules.deepspeed import deepspeed
from harness.config.rules.generation import generation
from harness.config.rules.offload import check_offload
from harness.config.rules.sources import read, shape_of
from harness.config.settings import Checkpointing, Pipeline, Refusal, Settings

TRACKERS = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
"""The packages of each tracker, which its extra of pyproject.toml brings."""


def check(settings: Settings) -> None:
    """Raise Refusal for an impossible combination, as far as that is known without torch and without other ranks."""
    rules = (
        _parallelism,
        _pipeline,
        _rehearsal,
        _model,
        _checkpointing,
        loss.check,
        data.check,
        fp8.check,
        _train,
        _trackers,
        deepspeed,
        generation,
    )
    for rule in (*rules, optimizer.check, in_backward.check, quantized.check, adapter.check, compiled.check):
        rule(settings)


def check_world(settings: Settings, size: int, overrides: Sequence[str] = ()) -> None:
    """Refuse a world of `size` ranks that `settings` cannot run in. `overrides` complete the command in the remedy."""
    world, stages, train, layout = (
        settings.world,
        settings.pipeline.stages,
        settings.train,
        settings.layout(size),
    )
    if world.size is not None and world.size != size:
        raise Refusal(
            "world.size", world.size, f"{_ranks(size)} here; start {_torchrun(world.size, overrides)}"
        )
    if world.per_node is not None and size > world.per_node and size % world.per_node:
        raise Refusal("world.per_node", world.per_node, f"{_ranks(size)} do not fill nodes of so many evenly")
    tensor_parallel = settings.tensor_parallel
    if size % tensor_parallel:
        command = _torchrun(-(-size // tensor_parallel) * tensor_parallel, overrides)
        remedy = f"{_ranks(size)} here, and so many share each layer; start {command}"
        raise Refusal("generation.tensor_parallel", tensor_parallel, remedy)
    if size % (stages * tensor_parallel):
        ranks = -(-size // (stages * tensor_parallel)) * stages * tensor_parallel
        units = (
            f"stages of {tensor_parallel} ranks that share their layers" if tensor_parallel > 1 else "stages"
        )
        raise Refusal(
            "pipeline.stages",
            stages,
            f"{_ranks(size)} here, and {units} must divide them evenly; start {_torchrun(ranks, overrides)}",
        )
    in_backward.check_size(settings, size)
    sequences = train.micro_batch * layout.dp_size
    if settings.mode == "train" and train.batch is not None and train.batch != sequences * train.accumulation:
        remedy = (
            f"train.accumulation={train.batch // sequences} makes that"
            if train.batch % sequences == 0
            else f"it must be a multiple of that, as {-(-train.batch // sequences) * sequences} is"
        )
        product = f"train.micro_batch={train.micro_batch} on {_ranks(layout.dp_size, 'replica')} is {sequences} at once"
        raise Refusal(
            "train.batch", train.batch, f"{product}, train.accumulation={train.accumulation}; {remedy}"
        )


def check_layers(checkpointing: Checkpointing, number: int) -> None:
    """Refuse to recompute layers that a model of `number` layers does not have."""
    for layer in checkpointing.layers:
        if layer >= number:
            remedy = f"there is no layer {layer}; the model has {number}, from 0 to {number - 1}"
            raise Refusal("checkpointing.layers", checkpointing.layers, remedy)
    if checkpointing.every > number:
        remedy = f"the model has {number} layers; give no more than that, or checkpointing.layers=[0]"
        raise Refusal("checkpointing.every", checkpointing.every, remedy)


def _parallelism(settings: Settings) -> None:
    zero, stages = settings.zero, settings.pipeline.stages
    if zero.offload != "none" and zero.stage == 0:
        raise Refusal("zero.offload", zero.offload, "zero=0 shards nothing to offload; use zero=1, 2 or 3")
    if zero.offload == "all" and zero.stage != 3:
        raise Refusal(
            "zero.offload",
            "all",
            f"only zero=3 offloads parameters; with zero={zero.stage} use zero.offload=optimizer",
        )
    if settings.mode == "train" and zero.stage in (1, 2) and zero.allgather_bucket_size % 2:
        raise Refusal(
            "zero.allgather_bucket_size",
            zero.allgather_bucket_size,
            f"DeepSpeed aligns two elements, and needs an even number; use {zero.allgather_bucket_size + 1}",
        )
    if stages > 1 and zero.stage > 1:
        raise Refusal(
            "zero",
            zero.stage,
            f"a pipeline keeps whole gradients; with pipeline.stages={stages} use zero=0 or 1",
        )


def _pipeline(settings: Settings) -> None:
    pipeline, batch = settings.pipeline, settings.generation.batch
    if pipeline.stages == 1:
        for key, value, default in (("split", pipeline.split, "uniform"), ("groups", pipeline.groups, None)):
            if value != default:
                raise Refusal(f"pipeline.{key}", value, "one stage needs none; add pipeline.stages=")
        return
    if settings.mode == "infer" and pipeline.groups is not None and pipeline.groups > batch:
        raise Refusal(
            "pipeline.groups", pipeline.groups, f"each group needs a prompt, and generation.batch={batch}"
        )
    _, layers = read(shape_of(settings.model), "num_hidden_layers")
    if isinstance(layers, int):
        check_split(pipeline, layers)


def check_split(pipeline: Pipeline, layers: int) -> None:
    """Refuse more stages than `layers`, and a list that does not give each stage its number of layers."""
    stages, split = pipeline.stages, pipeline.split
    if stages > layers:
        raise Refusal("pipeline.stages", stages, f"the model has {layers} layers; use {layers} or fewer")
    if isinstance(split, list) and len(split) != stages:
        raise Refusal(
            "pipeline.split",
            split,
            f"names the layers of {len(split)} stages, and pipeline.stages={stages}",
        )
    if isinstance(split, list) and sum(split) != layers:
        raise Refusal("pipeline.split", split, f"adds up to {sum(split)} layers, and the model has {layers}")


def _rehearsal(settings: Settings) -> None:
    if settings.world.kind != "rehearsed":
        if settings.hardware.allocator is not None:
            remedy = "it is for rehearsals; a run takes what PYTORCH_ALLOC_CONF says in its environment"
            raise Refusal("hardware.allocator", settings.hardware.allocator, remedy)
        return
    if settings.world.size is None:
        raise Refusal("world.size", None, "world=rehearsed needs world.size=, the ranks to rehearse")
    if settings.tracker:
        remedy = "a rehearsal has no losses and no rates; its peaks are in its record: leave tracker out"
        raise Refusal("tracker", settings.tracker, remedy)
    if settings.ledger.mode != "exact":
        raise Refusal(
            "ledger", settings.ledger.mode, "a rehearsal measures with the exact ledger; use ledger=exact"
        )
    if settings.ledger.snapshot and settings.hardware.device != "cuda":
        remedy = (
            "only CUDA's allocator has a snapshot; rehearse a GPU, as by hardware=h100-sxm, or leave it out"
        )
        raise Refusal("ledger.snapshot", True, remedy)
    if settings.train.resume is not None:
        raise Refusal(
            "train.resume", settings.train.resume, "a rehearsal begins with the first step; leave it out"
        )


def _trackers(settings: Settings) -> None:
    for tracker in settings.tracker:
        for package in TRACKERS[tracker]:
            packages.check("tracker", tracker, package, tracker)


def _model(settings: Settings) -> None:
    model = settings.model
    shape = shape_of(model)
    widths.check(shape, "model.config." if model.path is None else f"{model.path}/config.json: ")
    positions.check(settings, shape)


def _checkpointing(settings: Settings) -> None:
    checkpointing = settings.checkpointing
    if settings.mode == "infer" and checkpointing.mode != "none":
        remedy = "inference keeps nothing to recompute; use checkpointing=none"
        raise Refusal("checkpointing", checkpointing.mode, remedy)
    for key, value, off in (("layers", checkpointing.layers, []), ("every", checkpointing.every, 1)):
        if checkpointing.mode == "none" and value != off:
            remedy = "checkpointing=none recomputes no layer; use checkpointing=selective or full"
            raise Refusal(f"checkpointing.{key}", value, remedy)
    if checkpointing.layers and checkpointing.every > 1:
        raise Refusal(
            "checkpointing.every", checkpointing.every, "give either it or checkpointing.layers=, not both"
        )
    if len(set(checkpointing.layers)) < len(checkpointing.layers):
        raise Refusal("checkpointing.layers", checkpointing.layers, "give each layer once")
    check_offload(settings.mode, checkpointing)
    _, layers = read(shape_of(settings.model), "num_hidden_layers")
    if isinstance(layers, int):
        check_layers(checkpointing, layers)


def _train(settings: Settings) -> None:
    train = settings.train
    if settings.mode == "infer":
        if train.resume is not None:
            raise Refusal(
                "train.resume", train.resume, "mode=infer resumes nothing; give model.path= a checkpoint"
            )
        return
    if train.sequence < 2:
        raise Refusal("train.sequence", train.sequence, "to predict a next token takes 2 or more")
    if train.warmup_steps >= train.steps and train.warmup_steps > 0:
        raise Refusal(
            "train.warmup_steps", train.warmup_steps, f"must be fewer than train.steps={train.steps}"
        )
    if train.save_every > train.steps:
        raise Refusal(
            "train.save_every", train.save_every, f"would never save within train.steps={train.steps}"
        )
    check_changes(train.resume_changes, train.resume is not None)
    if train.resume is not None and not os.path.isdir(os.path.expanduser(train.resume)):
        raise Refusal("train.resume", train.resume, "no such directory; give that of a run with checkpoints")


def _ranks(count: int, name: str = "rank") -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _torchrun(size: int, overrides: Sequence[str]) -> str:
    return " ".join(["torchrun --standalone --nproc-per-node", str(size), "-m harness", *overrides])
