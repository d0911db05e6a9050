"""A pipeline stage wrapped by DeepSpeed: `train_step` runs its 1F1B schedule, one instruction at a time."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from harness.config.load import Settings
from harness.data.batch import Batch
from harness.ledger import Ledger
from harness.ledger.patch import DATA, DEEPSPEED, Patch, install, table
from harness.model import activation_checkpointing, activation_offload, adapter
from harness.model.partition import ranges
from harness.model.stage import Stage, parts
from harness.runtime import faults
from harness.runtime.world import World
from harness.training import fp8, head_loss, optimizers
from harness.training.deepspeed_config import engine_config
from harness.training.engine import claim, import_deepspeed, norm_of, set_rate
from harness.training.nonfinite import Found, Guard, Watch

_ENGINE = "deepspeed.runtime.pipe.engine.PipelineEngine"
_MODULE = "deepspeed.runtime.pipe.module.PipelineModule"
_STAYS = "as long as the engine lives"

PATCHES = table(
    Patch(
        _ENGINE,
        "_INSTRUCTION_MAP",
        "each instruction belongs to a phase of the ledger",
        DEEPSPEED,
        unchecked=DATA,
        stays=_STAYS,
    ),
    Patch(
        _ENGINE,
        "_aggregate_total_loss",
        "the mean of the loss belongs to the step",
        DEEPSPEED,
        stays=_STAYS,
    ),
    Patch(
        _MODULE,
        "get_tied_weights_and_groups",
        "a stage is one layer to DeepSpeed, which finds no tied weights in it",
        DEEPSPEED,
        stays=_STAYS,
    ),
)

PHASES: Mapping[str, tuple[str, int]] = {
    "LoadMicroBatch": ("data", 0),
    "RecvActivation": ("forward", 0),
    "ForwardPass": ("forward", 0),
    "SendActivation": ("forward", -1),
    "RecvGrad": ("backward", 0),
    "BackwardPass": ("backward", 0),
    "SendGrad": ("backward", -1),
    "ReduceTiedGrads": ("step", 0),
    "ReduceGrads": ("step", 0),
    "OptimizerStep": ("step", 0),
}
"""For each instruction of DeepSpeed's schedule: its ledger phase, and an offset from that phase's next micro-batch."""


class Pipeline:
    """One stage of a model wrapped by DeepSpeed, as `Engine` wraps a whole model.

    `whole` is the model on `meta`. A step has `train.accumulation` micro-batches.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        ledger: Ledger,
        stage: Stage,
        whole: PreTrainedModel,
        split: list[int],
    ) -> None:
        self.settings, self.world, self.ledger = settings, world, ledger
        self.stage, self.whole, self.split = stage, whole, split
        deepspeed, config = import_deepspeed(world), engine_config(settings, world.dp_size)
        fp8.apply(settings, stage.model)
        stage.to(world.device)
        stage.receives = [settings.train.micro_batch, settings.train.sequence, stage.hidden]
        ledger.own(model=stage.model)
        offload = activation_offload.apply(stage.model, settings.checkpointing, world.device, ledger)
        first = ranges(split)[world.stage].start
        activation_checkpointing.apply(stage.model, settings.checkpointing, first, offload)
        if stage.last:
            head_loss.apply(stage.model, settings.loss)
        self.inner = optimizers.build(settings, world, stage)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its layers and parameter counts
            module = _module(world, stage)
            self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=self.inner, config=config)
        ledger.own(engine=self.deepspeed)
        self.guard = Guard(settings, world, ledger, self.deepspeed, self.inner)
        self._step, self._training = 0, True
        self._done = {"forward": 0, "backward": 0}
        for name, replacement in (
            ("_INSTRUCTION_MAP", self._instructions_in_phases),
            ("_aggregate_total_loss", self._in_step_phase),
        ):
            install(PATCHES[f"{_ENGINE}.{name}"].by(replacement, self.deepspeed))

    @property
    def module(self) -> nn.Module:
        """The module that DeepSpeed trains."""
        return self.deepspeed.module  # type: ignore[no-any-return]

    @property
    def optimizer_class(self) -> str:
        """DeepSpeed chooses the class by stage and precision; the record has its name."""
        return type(self.deepspeed.optimizer).__name__

    def train_step(self, batches: Iterator[Batch], step: int) -> float:
        """Run one optimizer step over the next micro-batches; return the mean loss per token of all ranks."""
        set_rate(self.inner, self.settings.train, step)
        self._begin(step, training=True)
        with self.guard.update():
            return float(self.deepspeed.train_batch(self._pairs(batches)))

    def not_finite_in(self, batches: Iterator[Batch], step: int) -> Iterator[Found | None]:
        """What is not finite in this stage in `step`, computed once more: its micro-batches are on their way at once.
        Collective.
        """
        with Watch(self.stage.model, self.world.stage).watching() as watch:
            loss = self.train_step(batches, step)
        yield watch.found(loss if self.stage.last else 0.0)

    @property
    def gradient_norm(self) -> float | None:
        """As `Engine.gradient_norm`."""
        return norm_of(self.deepspeed, self.ledger)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], step: int) -> float:
        """The mean loss per token over `train.validation_batches` of `batches`, over all ranks."""
        self._begin(step, training=False)
        number = self.settings.train.validation_batches
        return float(self.deepspeed.eval_batch(self._pairs(batches), num_micro_batches=number))

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """The whole model's weights that are exported, on the CPU at rank 0; None elsewhere. Collective."""
        own, world = self.stage.stored(), self.world
        state: dict[str, torch.Tensor] = {}
        visited: set[int] = set()  # a tied parameter is in two stages
        for stage, part in enumerate(parts(self.whole, self.split, buffers=True)):
            for name, meta_tensor in part.items():
                if id(meta_tensor) in visited or not adapter.exported(self.settings, meta_tensor):
                    continue
                visited.add(id(meta_tensor))
                if world.rank == world.layout.rank(stage) and not world.leads:
                    # .to(): DeepSpeed may have changed the dtype of a buffer
                    dist.send(own[name].detach().to(meta_tensor.dtype), 0)
                if world.leads and stage == 0:
                    state[name] = own[name].detach().to("cpu", copy=True)
                elif world.leads:
                    received = torch.empty_like(meta_tensor, device=world.device)
                    dist.recv(received, world.layout.rank(stage))
                    state[name] = received.to("cpu")
        return state if world.leads else None

    def _begin(self, step: int, training: bool) -> None:
        self._step, self._training = step, training
        self._done = {"forward": 0, "backward": 0}

    def _pairs(self, batches: Iterator[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and labels: the first stage uses the inputs, the last the labels."""
        for batch in batches:
            claim(self.ledger, batch)
            self.stage.items = None if batch.share is None else batch.share.labels
            yield batch.tokens, batch.targets

    def _instructions_in_phases(self, instructions: Mapping[type, Callable[..., None]]) -> dict[type, Any]:
        return {kind: self._in_phase(kind.__name__, each) for kind, each in instructions.items()}

    def _in_phase(self, name: str, instruction: Callable[..., None]) -> Callable[..., None]:
        """Wrap an instruction so that it runs in its ledger phase."""
        phase, offset = PHASES[name]

        def watched(engine: Any, **arguments: Any) -> None:
            number = self._done.get(phase, self._done["forward"]) + offset if phase != "step" else 0
            with self.ledger.phase(phase if self._training else "validate", self._step, number):
                faults.at(phase, self._step)
                instruction(engine, **arguments)
                if name == "ForwardPass" and self.stage.last and self._training and self.guard.on:
                    with self.ledger.uncounted():
                        engine.loss = self.guard.seen(engine.loss, float(engine.loss.detach()))
            if name in ("ForwardPass", "BackwardPass"):
                self._done[phase] += 1

        return watched

    def _in_step_phase(self, aggregate: Callable[[], Any]) -> Callable[[], Any]:
        def watched() -> Any:
            with self.ledger.phase("step", self._step):
                return aggregate()

        return watched


def _module(world: World, stage: Stage) -> nn.Module:
    """DeepSpeed's PipelineModule, in which each rank has one layer: its stage."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    layers: list[Any] = [LayerSpec(nn.Identity) for _ in range(world.stages)]
    layers[world.stage] = stage
    module: nn.Module = PipelineModule(
        layers, num_stages=world.stages, loss_fn=stage.loss, partition_method="uniform"
    )
    own = stage.owned()
    groups = [(name, _first_and_last_group(world)) for name in sorted(stage.tied)]

    def tied_weights_and_groups() -> list[tuple[nn.Parameter, Any]]:
        return [(own[name], group) for name, group in groups if name in own and own[name].requires_grad]

    install(PATCHES[f"{_MODULE}.get_tied_weights_and_groups"].by(lambda _: tied_weights_and_groups, module))
    for name, parameter in own.items():
        duplicate = stage.last and name in stage.tied
        parameter.ds_pipe_replicated = duplicate  # type: ignore[attr-defined]  # the gradient norm must count it once
        parameter.model_parallel = not duplicate  # type: ignore[attr-defined]  # without ZeRO, this makes the norm sum over stages
    return module


def _first_and_last_group(world: World) -> Any:
    """The process group of the first and the last stage of this rank's replica. Collective."""
    pairs = (
        [world.layout.rank(stage, dp_rank) for stage in (0, world.stages - 1)]
        for dp_rank in range(world.dp_size)
    )
    return [dist.new_group(pair) for pair in pairs][world.dp_rank]
