"""DeepSpeed's configuration of a run: what the engine gets, and the file that a run leaves."""

from collections.abc import Mapping
from typing import Any

from harness.config.rules.optimizer import MOMENTUM, USED
from harness.config.settings import Settings

FILE = "deepspeed.json"

SCHEDULES = {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}
"""DeepSpeed's name for each `train.schedule`."""


TYPES = {
    "adamw": "AdamW",
    "adamw_8bit": "AdamW8bit",  # the name in bitsandbytes: DeepSpeed has none
    "adafactor": "Adafactor",
    "muon": "Muon",
    "sgd": "SGD",
    "lion": "Lion",
}
"""DeepSpeed's name for each `optimizer.kind`."""


def engine_config(settings: Settings, dp_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `settings`, for `dp_size` data-parallel ranks.

    DeepSpeed's defaults clip gradients at 1.0 and skip steps that overflow in bf16. Both are set here, so that only
    what `settings` say happens. Bucket sizes and thresholds are in elements.
    """
    train, zero = settings.train, settings.zero
    optimization: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        # DeepSpeed's stage 3 makes whole gradients of muon's weights by all-reduce
        "reduce_scatter": not (settings.optimizer.kind == "muon" and zero.stage == 3),
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_bucket_size": zero.allgather_bucket_size,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.persistence_threshold,
    }
    if zero.offload in ("optimizer", "all"):
        optimization["offload_optimizer"] = {"device": "cpu"}
    if zero.offload == "all":
        optimization["offload_param"] = {"device": "cpu"}
    bf16 = {"enabled": settings.dtype == "bfloat16", "check_grad_overflow": False}
    if settings.optimizer.state == "bf16":
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config = {
        "train_batch_size": train.micro_batch * train.accumulation * dp_size,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "bf16": bf16,
        "zero_optimization": optimization,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW needs no compiler, even with offload
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    return merged(config, settings.deepspeed.options)


def whole_config(settings: Settings, dp_size: int) -> dict[str, Any]:
    """`engine_config` with the optimizer, its schedule and the stages, which the run gives to DeepSpeed as objects.

    `deepspeed.config=` makes the same settings of it, and `deepspeed.initialize` accepts it.
    """
    train, stages = settings.train, settings.pipeline.stages
    schedule: dict[str, Any] = {
        "warmup_max_lr": train.learning_rate,
        "warmup_num_steps": train.warmup_steps,
        "warmup_type": "linear",
    }
    if train.schedule == "cosine":
        schedule = {"warmup_num_steps": train.warmup_steps, "warmup_type": "linear", "cos_min_ratio": 0.0}
    if train.schedule != "constant":
        schedule["total_num_steps"] = train.steps
    config = engine_config(settings, dp_size) | {"optimizer": _optimizer(settings)}
    if train.warmup_steps:  # DeepSpeed has no schedule without a warm-up
        config["scheduler"] = {"type": SCHEDULES[train.schedule], "params": schedule}
    if stages > 1:
        config["pipeline"] = {"stages": stages}
        if settings.pipeline.split in ("uniform", "parameters"):
            config["pipeline"]["partition"] = settings.pipeline.split
    return config


def _optimizer(settings: Settings) -> dict[str, Any]:
    """The section of the optimizer."""
    kind, train = settings.optimizer.kind, settings.train
    params: dict[str, Any] = {"lr": train.learning_rate}
    if "betas" in USED[kind]:
        params["betas"] = [*train.betas]
    if "epsilon" in USED[kind]:
        params["eps"] = train.epsilon
    params["weight_decay"] = train.weight_decay
    if kind in ("adamw", "muon"):
        params["torch_adam"] = True
    if kind in MOMENTUM:
        momentum = settings.optimizer.momentum
        params["momentum"] = MOMENTUM[kind] if momentum is None else momentum
    if kind == "muon":
        params["ns_method"] = "standard"
    if "fused" in USED[kind]:
        params["fused"] = train.fused
    return {"type": TYPES[kind], "params": params}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, mapping by mapping."""
    return {**below} | {
        key: merged(below.get(key, {}), value) if isinstance(value, Mapping) else value
        for key, value in above.items()
    }
