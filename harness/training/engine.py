"""DeepSpeed behind one method, `train_step`. Every DeepSpeed default that matters is set explicitly."""

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from harness.config.load import Settings, Train
from harness.data.batch import Batch
from harness.ledger import Ledger
from harness.ledger.patch import DATA, DEEPSPEED, Patch, install, table
from harness.model import activation_checkpointing, activation_offload, adapter
from harness.model.init_weights import lasting
from harness.runtime import faults, imports
from harness.runtime.course import Backend
from harness.runtime.world import World
from harness.training import compiled_layers, fp8, head_loss, optimizers
from harness.training.deepspeed_config import engine_config
from harness.training.in_backward import GuardInBackward
from harness.training.nonfinite import Found, Guard, Watch

PATCHES = table(
    Patch(
        "deepspeed.ops.__compatible_ops__",
        "deepspeed_shm_comm",
        "DeepSpeed would compile this operator, which no run uses",
        DEEPSPEED,
        unchecked=DATA,
        stays="for the life of the process",
        optional=True,
    )
)


def learning_rate(train: Train, step: int) -> float:
    """The learning rate of `step` (from 0): linear warm-up, then `train.schedule` down to 0 at `train.steps`."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    left = 1 - (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[train.schedule]
    return train.learning_rate * factor


class Engine:
    """A model wrapped by DeepSpeed. `settings` decide the ZeRO stage, precision, accumulation and optimizer.

    `compiler` compiles its layers; None compiles nothing.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        ledger: Ledger,
        model: PreTrainedModel,
        compiler: Backend | None = None,
    ) -> None:
        self.settings, self.world, self.ledger = settings, world, ledger
        deepspeed, config = import_deepspeed(world), engine_config(settings, world.dp_size)
        fp8.apply(settings, model)
        if settings.zero.stage == 3:  # one parameter at a time: no device ever has them all
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        # DeepSpeed would do this later, but the ledger must first register the tensors
        model.to(world.device)
        ledger.own(model=model)
        offload = activation_offload.apply(model, settings.checkpointing, world.device, ledger)
        activation_checkpointing.apply(model, settings.checkpointing, offload=offload)
        head_loss.apply(model, settings.loss)
        if compiler is not None:
            compiled_layers.apply(model, compiler)
        self.inner = optimizers.build(settings, world, model)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.inner, config=config)
        self.inner.state.clear()  # without ZeRO, DeepSpeed has taken a step without gradients, and some would count it
        ledger.own(engine=self.deepspeed)
        guard = GuardInBackward if settings.train.optimizer_in_backward else Guard
        self.guard = guard(settings, world, ledger, self.deepspeed, self.inner)

    @property
    def module(self) -> torch.nn.Module:
        """The model itself."""
        return self.deepspeed.module  # type: ignore[no-any-return]

    @property
    def whole(self) -> torch.nn.Module:
        """The model whose state `full_state` returns."""
        return self.module

    @property
    def optimizer_class(self) -> str:
        """DeepSpeed chooses the class by stage and precision; the record has its name."""
        return type(self.deepspeed.optimizer).__name__

    def train_step(self, batches: Iterator[Batch], step: int) -> float:
        """Run one optimizer step over the next micro-batches; return the mean loss per token of all ranks."""
        losses = []
        set_rate(self.inner, self.settings.train, step)
        for micro_batch in range(self.settings.train.accumulation):
            with self.ledger.phase("data", step, micro_batch):
                batch = next(batches).to(self.world.device)
                claim(self.ledger, batch)
            losses.append(self._micro_step(batch, step, micro_batch))
        with self.guard.update(), self.ledger.phase("step", step):
            faults.at("step", step)
            self.deepspeed.step()
            return self.world.mean(sum(losses) / len(losses))

    def not_finite_in(self, batches: Iterator[Batch], step: int) -> Iterator[Found | None]:
        """For each micro-batch of `step`, computed once more, what is not finite on this rank. Collective."""
        for micro_batch in range(self.settings.train.accumulation):
            batch = next(batches).to(self.world.device)
            with compiled_layers.uncompiled(), Watch(self.module).watching() as watch:
                loss = self._micro_step(batch, step, micro_batch)
            yield watch.found(loss)

    def _micro_step(self, batch: Batch, step: int, micro_batch: int) -> float:
        """Run forward and backward over `batch`; return its loss."""
        with self.ledger.phase("forward", step, micro_batch):
            faults.at("forward", step)
            loss = self.deepspeed(**batch.arguments, use_cache=False).loss
        value = float(loss.detach())
        loss = self.guard.seen(loss, value)
        with self.ledger.phase("backward", step, micro_batch):
            faults.at("backward", step)
            self.deepspeed.backward(loss)
            if not self.deepspeed.is_gradient_accumulation_boundary():
                self.deepspeed.step()  # counts the micro-batch; does not change the weights
        return value

    @property
    def gradient_norm(self) -> float | None:
        """The norm of the last step's gradients over all ranks, before clipping. None: DeepSpeed does not keep it."""
        return norm_of(self.deepspeed, self.ledger)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], step: int) -> float:
        """The mean loss per token over `train.validation_batches` of `batches`, over all ranks."""
        self.deepspeed.eval()
        losses = []
        for index in range(self.settings.train.validation_batches):
            with self.ledger.phase("validate", step, index):
                batch = next(batches, None)
                if batch is None:  # a stream has ended
                    break
                claim(self.ledger, batch)
                losses.append(float(self.deepspeed(**batch.arguments, use_cache=False).loss))
        self.deepspeed.train()
        with self.ledger.phase("validate", step, len(losses) - 1, again=True):
            return self.world.mean(sum(losses) / len(losses))

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """The whole model's weights that are exported, on the CPU at rank 0; None elsewhere. Collective."""
        deepspeed = import_deepspeed(self.world)
        if self.settings.zero.stage == 3:
            self.deepspeed.empty_partition_cache()  # prefetched parameters cannot be gathered
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        state: dict[str, torch.Tensor] = {}
        lead = self.world.leads
        for parameter in self.module.parameters():  # one at a time: no device ever has the whole model
            if not adapter.exported(self.settings, parameter):
                continue
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
                if lead:
                    state[names[id(parameter)]] = parameter.detach().to("cpu", copy=True)
        if lead:
            state |= {
                name: buffer.detach().to("cpu", copy=True) for name, buffer in lasting(self.module).items()
            }
        return state if lead else None


def claim(ledger: Ledger, batch: Batch) -> None:
    """Register the tensors of `batch` with the ledger as inputs."""
    for name, tensor in batch.tensors.items():
        ledger.claim("inputs", name, tensor)


def set_rate(optimizer: torch.optim.Optimizer, train: Train, step: int) -> None:
    """Set the learning rate of `step` in `optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(train, step)


def norm_of(engine: Any, ledger: Ledger) -> float | None:
    """The gradient norm that DeepSpeed's `engine` keeps of its last step, if any."""
    norm = engine.get_global_grad_norm()
    with ledger.uncounted():  # it may be a tensor
        return None if norm is None else float(norm)


def import_deepspeed(world: World) -> Any:
    """Import DeepSpeed into the process group of `world`.

    This hides its banners and the warnings that deprecated torch calls would print at every step, and turns off a
    shared-memory operator that it would compile and never use. Its errors still appear.
    """
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed = imports.import_deepspeed()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    install(PATCHES["deepspeed.ops.__compatible_ops__.deepspeed_shm_comm"].by(lambda _: False))
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    return deepspeed
