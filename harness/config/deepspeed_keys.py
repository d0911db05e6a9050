"""DeepSpeed's own keys, as dotted paths: which are settings here, which go to DeepSpeed unchanged, and which cannot.

The list is that of DeepSpeed 0.19; `tests/config/test_deepspeed_keys.py` reads its classes, and notices a new key.
"""

from typing import Any, Literal, NamedTuple

from harness.config.fields.kinds import (
    Beta,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    ZeroStage,
)

AUTO = "auto"
"""The value with which a file leaves the choice to us, as to transformers' Trainer."""


class Setting(NamedTuple):
    """A key that is the setting `key`. `default` is DeepSpeed's value where its section leaves the key out."""

    key: str
    kind: Any
    default: Any = None


class Passed(NamedTuple):
    """A key that goes to DeepSpeed as it is. `ours` is what the engine sets without it; None: DeepSpeed's default."""

    kind: Any
    ours: Any = None


class Read(NamedTuple):
    """A key that is translated together with others, in `deepspeed_file.py`."""

    kind: Any


class Moot(NamedTuple):
    """A key that has no effect here, and the reason. A section that is moot is so with all in it."""

    why: str


class Refused(NamedTuple):
    """A key that cannot be honoured, and what to do. Null, auto and the `off` values are accepted; without any, false.

    A section is off where the key `switch` in it is; without a `switch`, where it is empty.
    """

    why: str
    off: tuple[Any, ...] = ()
    switch: str = ""


Entry = Setting | Passed | Read | Moot | Refused

ZERO = "zero_optimization."
_CHECKPOINTS, _PRINTS = "train.save_every= and train.resume= are the checkpoints here", "the record has it"
_NVME, _MODEL = "it is for NVMe alone", "a script reads it, and DeepSpeed does not"
_RECOMPUTE = "layers are recomputed here by checkpointing=full or selective; set it to false"
_GONE = "DeepSpeed has removed it; leave it out"
_MONITORS = "losses, rates and peaks are in the run's record.json; leave it out"
_DATA = "data= and train.sequence= choose the data here; leave it out"
_ZEROPP = "its kernels for quantized messages are no part of a rehearsal; set it to false"
_OTHER_BYTES = "a rehearsal would not have its bytes"


def _zero(key: str, entry: Entry) -> dict[str, Entry]:
    """A key of ZeRO-3 by both of the names that DeepSpeed accepts."""
    return {f"{ZERO}stage3_{key}": entry, f"{ZERO}{key}": entry}


def _offload(name: str) -> dict[str, Entry]:
    section = f"{ZERO}{name}."
    return {
        f"{section}device": Read(Literal["none", "cpu", "nvme"]),
        f"{section}pin_memory": Passed(bool),
        **dict.fromkeys([f"{section}{key}" for key in ("nvme_path", "buffer_count")], Moot(_NVME)),
    }


BATCH: dict[str, Entry] = {
    "train_batch_size": Read(Positive),
    "train_micro_batch_size_per_gpu": Setting("train.micro_batch", Positive),
    "gradient_accumulation_steps": Setting("train.accumulation", Positive),
    "gradient_clipping": Setting("train.clip", NotNegativeFloat, 1.0),
}

PRECISION: dict[str, Entry] = {
    "bf16.enabled": Read(bool),
    "bf16.check_grad_overflow": Refused("no step is left out here; set it to false"),
    "bf16.immediate_grad_update": Refused(f"{_OTHER_BYTES}; set it to false"),
    "bf16.bf16_master_weights_and_grads": Read(bool),
    "bf16.bf16_optimizer_states": Read(bool),
    "bfloat16": Refused("the old name of bf16; write bf16"),
    "fp16": Refused('precision is bf16 or fp32 here; write "bf16": {"enabled": true}', switch="enabled"),
    "torch_autocast": Refused(
        'precision is bf16 or fp32 here; write "bf16": {"enabled": true}', switch="enabled"
    ),
    "amp": Refused(f'{_GONE}, or write "bf16": {{"enabled": true}}', switch="enabled"),
    "data_types.grad_accum_dtype": Refused(f"gradients are added in the run's precision, {_OTHER_BYTES}"),
    "data_types.param_dtype": Refused("precision= is of parameters too; leave it out"),
    "data_types.buffer_dtype": Refused("buffers are as the model has them; leave it out"),
    "data_types.keep_in_fp32_modules": Refused(f"{_OTHER_BYTES}; leave it out"),
}

ZERO_KEYS: dict[str, Entry] = {
    f"{ZERO}stage": Setting("zero.stage", ZeroStage, 0),
    f"{ZERO}reduce_bucket_size": Setting("zero.reduce_bucket_size", Positive, 500_000_000),
    f"{ZERO}allgather_bucket_size": Setting("zero.allgather_bucket_size", Positive, 500_000_000),
    **_zero("prefetch_bucket_size", Setting("zero.prefetch_bucket_size", NotNegative, 50_000_000)),
    **_zero("param_persistence_threshold", Setting("zero.persistence_threshold", NotNegative, 100_000)),
    f"{ZERO}overlap_comm": Passed(bool, False),
    f"{ZERO}contiguous_gradients": Passed(bool, True),
    f"{ZERO}sub_group_size": Passed(Positive),
    f"{ZERO}allgather_partitions": Passed(bool),
    f"{ZERO}round_robin_gradients": Passed(bool),
    f"{ZERO}parameter_alignment": Passed(bool),
    f"{ZERO}ignore_unused_parameters": Passed(bool),
    f"{ZERO}memory_efficient_linear": Passed(bool),
    f"{ZERO}override_module_apply": Passed(bool),
    f"{ZERO}enable_sanity_checks": Passed(bool),
    **_zero("max_live_parameters", Passed(NotNegative)),
    **_zero("max_reuse_distance", Passed(NotNegative)),
    **_zero("model_persistence_threshold", Passed(NotNegative)),
    **_zero("use_all_reduce_for_fetch_params", Passed(bool)),
    **_zero("allgather_sequential", Passed(bool)),
    **_zero("gather_16bit_weights_on_model_save", Moot("train.export= gathers the weights here")),
    f"{ZERO}stage3_gather_fp16_weights_on_model_save": Moot("train.export= gathers the weights here"),
    **_zero("module_granularity_threshold", Refused(f"{_OTHER_BYTES}; set it to 0", (0,))),
    f"{ZERO}reduce_scatter": Read(bool),
    f"{ZERO}use_multi_rank_bucket_allreduce": Refused(f"{_OTHER_BYTES}; set it to true", (True,)),
    f"{ZERO}compute_grad_norm": Refused("gradients are clipped by their norm; set it to true", (True,)),
    f"{ZERO}legacy_stage1": Refused(f"{_OTHER_BYTES}; set it to false"),
    f"{ZERO}leaf_module": Refused("every module is fetched by itself here; leave it out"),
    f"{ZERO}zenflow": Refused("ZenFlow is not supported; leave it out"),
    f"{ZERO}zero_hpz_partition_size": Refused("a second partition is not supported; set it to 1", (0, 1)),
    f"{ZERO}zero_quantized_weights": Refused(_ZEROPP),
    f"{ZERO}zero_quantized_nontrainable_weights": Refused(_ZEROPP),
    f"{ZERO}zero_quantized_gradients": Refused(_ZEROPP),
    f"{ZERO}cpu_offload": Refused('the old name; write "offload_optimizer": {"device": "cpu"}'),
    f"{ZERO}cpu_offload_param": Refused('the old name; write "offload_param": {"device": "cpu"}'),
    f"{ZERO}cpu_offload_use_pin_memory": Refused('the old name; write "pin_memory" in "offload_optimizer"'),
    f"{ZERO}mics_shard_size": Refused(_GONE, (-1,)),
    f"{ZERO}mics_hierarchical_params_gather": Refused(_GONE),
    f"{ZERO}zeropp_loco_param": Refused(_GONE),
    **dict.fromkeys(
        [f"{ZERO}{key}" for key in ("load_from_fp32_weights", "elastic_checkpoint")], Moot(_CHECKPOINTS)
    ),
    f"{ZERO}pipeline_loading_checkpoint": Moot(_CHECKPOINTS),
    f"{ZERO}log_trace_cache_warnings": Moot("it only prints"),
    f"{ZERO}save_muon_momentum_buffer_in_memory": Moot("the momentum is in memory here"),
    **_offload("offload_optimizer"),
    **dict.fromkeys(
        [f"{ZERO}offload_optimizer.{key}" for key in ("pipeline_read", "pipeline_write", "fast_init")],
        Moot(_NVME),
    ),
    f"{ZERO}offload_optimizer.ratio": Refused("all of the optimizer is offloaded; set it to 1.0", (1,)),
    f"{ZERO}offload_optimizer.super_offload": Refused(f"{_OTHER_BYTES}; set it to false"),
    f"{ZERO}offload_optimizer.cpuadam_cores_perc": Moot("torch's AdamW takes OMP_NUM_THREADS"),
    **_offload("offload_param"),
    **dict.fromkeys([f"{ZERO}offload_param.{key}" for key in ("buffer_size", "max_in_cpu")], Moot(_NVME)),
}

OPTIMIZER: dict[str, Entry] = {
    "optimizer.type": Read(str),
    "optimizer.legacy_fusion": Refused("leave it out"),
    "optimizer.params.lr": Setting("train.learning_rate", PositiveFloat),
    "optimizer.params.weight_decay": Setting("train.weight_decay", NotNegativeFloat),
    "optimizer.params.betas": Setting("train.betas", tuple[Beta, Beta]),
    "optimizer.params.eps": Setting("train.epsilon", NotNegativeFloat),
    "optimizer.params.fused": Setting("train.fused", bool),
    "optimizer.params.momentum": Setting("optimizer.momentum", Beta),
    "optimizer.params.ns_method": Read(str),
    "optimizer.params.foreach": Moot("torch's own choice is taken"),
    "optimizer.params.torch_adam": Moot("AdamW is torch's always"),
    "optimizer.params.adam_w_mode": Refused("the optimizer is AdamW; set it to true", (True,)),
    **dict.fromkeys(
        [f"optimizer.params.{key}" for key in ("muon_lr", "adam_lr")],
        Refused("one learning rate is for all weights here; leave it out"),
    ),
    "optimizer.params.per_head_muon": Refused("Muon takes whole matrices here; set it to false"),
    "optimizer.params.nesterov": Refused("momentum is plain here; set it to false"),
    "optimizer.params.dampening": Refused("momentum is plain here; set it to 0", (0,)),
    "optimizer.params.bias_correction": Refused("AdamW corrects its bias; set it to true", (True,)),
    "optimizer.params.amsgrad": Refused("AMSGrad is not supported; set it to false"),
    "optimizer.params.max_grad_norm": Refused('DeepSpeed ignores it there; write "gradient_clipping"', (0,)),
    "scheduler.type": Read(str),
    "scheduler.params.warmup_max_lr": Setting("train.learning_rate", PositiveFloat),
    "scheduler.params.warmup_num_steps": Setting("train.warmup_steps", Positive),
    "scheduler.params.total_num_steps": Setting("train.steps", Positive),
    "scheduler.params.warmup_min_lr": Refused("a warm-up begins at 0; set it to 0", (0,)),
    "scheduler.params.warmup_min_ratio": Refused("a warm-up begins at 0; set it to 0", (0,)),
    "scheduler.params.cos_min_ratio": Refused("the cosine ends at 0; set it to 0", (0,)),
    "scheduler.params.warmup_type": Refused("a warm-up is linear here; set it to linear", ("linear",)),
    "scheduler.params.last_batch_iteration": Refused("train.resume= continues a run; leave it out", (-1,)),
}

ENGINE: dict[str, Entry] = {
    "pipeline.stages": Setting("pipeline.stages", Positive),
    "pipeline.partition": Setting("pipeline.split", Literal["uniform", "parameters"]),
    "pipeline.activation_checkpoint_interval": Read(NotNegative),
    "pipeline.use_reentrant": Moot("layers are recomputed by torch's checkpoint without it"),
    **dict.fromkeys(
        [f"pipeline.{key}" for key in ("seed_layers", "pipe_partitioned", "grad_partitioned")],
        Moot("stages share no layer here"),
    ),
    **{
        f"activation_checkpointing.{key}": Refused(_RECOMPUTE)
        for key in ("partition_activations", "contiguous_memory_optimization")
    },
    "activation_checkpointing.cpu_checkpointing": Refused(
        "checkpointing=full checkpointing.offload=cpu do that here; set it to false"
    ),
    **{
        f"activation_checkpointing.{key}": Moot("checkpointing= says which layers are recomputed")
        for key in ("number_checkpoints", "synchronize_checkpoint_boundary", "profile")
    },
    "communication_data_type": Passed(Literal["fp32", "bf16"]),
    "prescale_gradients": Refused(f"{_OTHER_BYTES}; set it to false"),
    "gradient_predivide_factor": Refused(f"{_OTHER_BYTES}; set it to 1.0", (1,)),
    "gradient_allreduce_op": Refused("gradients are a mean over ranks; set it to mean", ("mean",)),
    "managed_gradient_accumulation": Refused("accumulation is the engine's; set it to true", (True,)),
    "zero_allow_untested_optimizer": Moot("it is true here"),
    "zero_force_ds_cpu_optimizer": Moot("the optimizer is torch's AdamW, with offload too"),
    "disable_allgather": Moot("no release has an effect of it"),
}

AROUND: dict[str, Entry] = {
    **dict.fromkeys(
        (
            *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level"),
            "timers",
        ),
        Moot(_PRINTS),
    ),
    "checkpoint": Moot(_CHECKPOINTS),
    "datastates_ckpt": Refused("DataStates is not supported; leave it out"),
    "aio": Moot(_NVME),
    "dataloader_drop_last": Moot("every batch is full here"),
    "disable_python_gc": Moot("Python's collector frees no tensor of a step"),
    "vocabulary_size": Moot("the model has its own"),
    "seq_parallel_communication_data_type": Moot("sequences are whole here"),
    "use_data_before_expert_parallelism": Moot("experts are whole here"),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), Refused(_MONITORS, switch="enabled")),
    "flops_profiler": Refused("the record has each phase's operations; leave it out", switch="enabled"),
    "comms_logger": Refused("the record has each phase's messages; leave it out", switch="enabled"),
    "autotuning": Refused("python -m harness fit searches what fits; leave it out", switch="enabled"),
    "data_efficiency": Refused(_DATA, switch="enabled"),
    "curriculum_learning": Refused(_DATA, switch="enabled"),
    "hybrid_engine": Refused("training and generation are runs of their own; leave it out", switch="enabled"),
    "compile": Refused(
        "a step is not compiled whole; leave it out, or use train.compile=true",
        switch="deepcompile",
    ),
    "tensor_parallel": Refused("training has whole layers; use pipeline.stages=", switch="autotp_size"),
    "expert_parallel": Refused("experts are whole here; leave it out", switch="enabled"),
    "sequence_parallel_size": Refused("sequences are whole here; set it to 1", (1,)),
    "weight_quantization": Refused("training has whole weights; leave it out"),
    **dict.fromkeys(
        ("progressive_layer_drop", "compression_training", "quantize_training", "eigenvalue", "elasticity"),
        Refused(_GONE, switch="enabled"),
    ),
    **dict.fromkeys(("sparse_attention", "sparse_gradients", "nebula", "graph_harvesting"), Refused(_GONE)),
}

KEYS: dict[str, Entry] = {**BATCH, **PRECISION, **ZERO_KEYS, **OPTIMIZER, **ENGINE, **AROUND}
