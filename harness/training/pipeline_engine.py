"""A pipeline of stages in DeepSpeed's hands: `train_step` carries out its 1F1B schedule, an instruction at a time."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from harness.config.load import Settings
from harness.ledger import Ledger
from harness.model import activation_checkpointing
from harness.model.partition import ranges
from harness.model.stage import Stage, parts
from harness.runtime.world import World
from harness.training.engine import adamw, deepspeed_config, import_deepspeed, set_rate

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
"""The phase of each instruction of DeepSpeed's schedule, and its micro-batch, from that phase's next one."""


class Pipeline:
    """One stage of a model in DeepSpeed's hands; as `Engine` is for a whole one.

    `whole` is the model's outline. Micro-batches of a step are `train.accumulation`.
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
        deepspeed, config = import_deepspeed(world), deepspeed_config(settings, world.replicas)
        stage.to(world.device)
        stage.receives = [settings.train.micro_batch, settings.train.sequence, stage.hidden]
        ledger.own(model=stage.model)
        activation_checkpointing.apply(stage.model, settings.checkpointing, ranges(split)[world.stage].start)
        self.inner = adamw(settings, world, stage)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it thinks it takes
            module = _module(world, stage)
            self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=self.inner, config=config)
        ledger.own(engine=self.deepspeed)
        self._step, self._training = 0, True
        self._done = {"forward": 0, "backward": 0}
        self.deepspeed._INSTRUCTION_MAP = {
            kind: self._watched(kind.__name__, carry_out)
            for kind, carry_out in self.deepspeed._INSTRUCTION_MAP.items()
        }
        self.deepspeed._aggregate_total_loss = self._in_step(self.deepspeed._aggregate_total_loss)

    @property
    def module(self) -> nn.Module:
        """What DeepSpeed steps."""
        return self.deepspeed.module  # type: ignore[no-any-return]

    @property
    def optimizer_class(self) -> str:
        """DeepSpeed picks one by stage and precision; which one is part of the record."""
        return type(self.deepspeed.optimizer).__name__

    def train_step(self, batches: Iterator[torch.Tensor], step: int) -> float:
        """One optimizer step over the next micro-batches [micro_batch, sequence]; the loss per token on every rank."""
        set_rate(self.inner, self.settings.train, step)
        self._begin(step, training=True)
        return float(self.deepspeed.train_batch(self._pairs(batches)))

    @torch.no_grad()
    def evaluate(self, batches: Iterator[torch.Tensor], step: int) -> float:
        """The mean loss per token over `train.validation_batches` of `batches`, on every rank."""
        self._begin(step, training=False)
        number = self.settings.train.validation_batches
        return float(self.deepspeed.eval_batch(self._pairs(batches), num_micro_batches=number))

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """The whole model's weights on CPU at rank 0, None elsewhere. Every rank must call it."""
        own, world = self.stage.stored(), self.world
        state: dict[str, torch.Tensor] = {}
        seen: set[int] = set()  # a tied one is in two stages
        for stage, part in enumerate(parts(self.whole, self.split, buffers=True)):
            for name, outline in part.items():
                if id(outline) in seen:
                    continue
                seen.add(id(outline))
                if world.rank == stage * world.replicas and not world.leads:
                    dist.send(
                        own[name].detach().to(outline.dtype), 0
                    )  # DeepSpeed may have changed a buffer's
                if world.leads and stage == 0:
                    state[name] = own[name].detach().to("cpu", copy=True)
                elif world.leads:
                    arrived = torch.empty_like(outline, device=world.device)
                    dist.recv(arrived, stage * world.replicas)
                    state[name] = arrived.to("cpu")
        return state if world.leads else None

    def _begin(self, step: int, training: bool) -> None:
        self._step, self._training = step, training
        self._done = {"forward": 0, "backward": 0}

    def _pairs(self, batches: Iterator[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and labels, which are the same tokens: the first stage takes the one, the last the other."""
        for tokens in batches:
            self.ledger.claim("inputs", "tokens", tokens)
            yield tokens, tokens

    def _watched(self, name: str, carry_out: Callable[..., None]) -> Callable[..., None]:
        """An instruction that is carried out in its phase of the ledger."""
        phase, before = PHASES[name]

        def watched(engine: Any, **arguments: Any) -> None:
            number = self._done.get(phase, self._done["forward"]) + before if phase != "step" else 0
            with self.ledger.phase(phase if self._training else "validate", self._step, number):
                carry_out(engine, **arguments)
            if name in ("ForwardPass", "BackwardPass"):
                self._done[phase] += 1

        return watched

    def _in_step(self, aggregate: Callable[[], Any]) -> Callable[[], Any]:
        def watched() -> Any:
            with self.ledger.phase("step", self._step):
                return aggregate()

        return watched


def _module(world: World, stage: Stage) -> nn.Module:
    """DeepSpeed's own, of which each rank has one layer: its stage."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    layers: list[Any] = [LayerSpec(nn.Identity) for _ in range(world.stages)]
    layers[world.stage] = stage
    module: nn.Module = PipelineModule(
        layers, num_stages=world.stages, loss_fn=stage.loss, partition_method="uniform"
    )
    own = stage.owned()
    groups = [(name, _ends(world)) for name in sorted(stage.tied)]
    module.get_tied_weights_and_groups = lambda: [  # type: ignore[assignment]
        (own[name], group) for name, group in groups if name in own
    ]
    for name, parameter in own.items():
        again = stage.last and name in stage.tied
        parameter.ds_pipe_replicated = again  # type: ignore[attr-defined]  # the norm of the gradients has it once
        parameter.model_parallel = not again  # type: ignore[attr-defined]  # and every stage's, without ZeRO too
    return module


def _ends(world: World) -> Any:
    """The group of the first and the last stage of this rank's replica. Every rank must ask."""
    last = (world.stages - 1) * world.replicas
    groups = [dist.new_group([replica, last + replica]) for replica in range(world.replicas)]
    return groups[world.replica]
