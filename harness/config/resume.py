"""What a resumed run must have in common with the run that it continues, by key.

A checkpoint has a value for each key of `FIXED` and `CHANGEABLE`. Every field of the settings is one of these keys, a
part of one (`PARTS`), or changes no number of a training run (`FREE`).
"""

from collections.abc import Mapping
from typing import Any

from harness.config.settings import Refusal

FIXED = (
    *("world.size", "pipeline.stages", "pipeline.split", "zero.stage", "zero.offload", "precision"),
    *("train.micro_batch", "train.accumulation", "train.sequence", "train.fused", "deepspeed.options"),
    *("optimizer.kind", "optimizer.state", "optimizer.momentum"),
    *("adapter.kind", "adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.targets", "adapter.path"),
    "model.config",
)
"""What the saved tensors, or the place in the data, depend on."""

CHANGEABLE = (
    *("model", "model.attention", "data", "data.tokenizer", "data.packing", "data.validation", "seed"),
    *(
        "train.steps",
        "train.learning_rate",
        "train.betas",
        "train.epsilon",
        "train.weight_decay",
        "train.clip",
    ),
    *("train.warmup_steps", "train.schedule", "zero.reduce_bucket_size", "hardware.device"),
    *("loss.kind", "loss.chunk", "train.compile"),
)
"""What may differ if `train.resume_changes` names it."""

PARTS: Mapping[str, str] = {
    **dict.fromkeys(("model.name", "model.path"), "model"),
    **dict.fromkeys(
        [f"data.{name}" for name in ("kind", "name", "path", "split", "column", "streaming")], "data"
    ),
}
"""The key that stands for a field."""

FREE = frozenset(
    {
        *("mode", "tracker", "world.kind", "world.timeout", "world.per_node", "deepspeed.config"),
        *(
            "model.random",
            "model.trust_remote_code",
            "data.cache_dir",
        ),  # the weights are those of the checkpoint
        *(
            "zero.allgather_bucket_size",
            "zero.prefetch_bucket_size",
            "zero.persistence_threshold",
        ),  # copies alone
        *(
            "checkpointing.mode",
            "checkpointing.layers",
            "checkpointing.every",
            "checkpointing.offload",
        ),  # what is computed again is the same
        "adapter.merge",  # how the end is written
        "train.optimizer_in_backward",  # each update is the same
        *("pipeline.groups", "train.batch", "train.validate_every", "train.validation_batches"),
        *(
            "train.save_every",
            "train.save_on_term",
            "train.keep",
            "train.resume",
            "train.resume_changes",
            "train.export",
        ),
        "train.nonfinite",  # a run that stopped may go on with skip
    }
)
"""Fields that change no number of a training run, beside all of `generation`, `ledger`, `hardware` and `network`."""

FREE_GROUPS = ("generation", "ledger", "hardware", "network")

AGAIN = "begin a new run from its weights instead, with model.path="


SINCE: Mapping[str, Any] = {
    "optimizer.kind": "adamw",
    "optimizer.state": "fp32",
    "optimizer.momentum": None,
    "adapter.kind": "none",
    "adapter.rank": 8,
    "adapter.alpha": 16,
    "adapter.dropout": 0.0,
    "adapter.targets": [],
    "adapter.path": None,
    "loss.kind": "full",
    "loss.chunk": None,
    "train.compile": False,
    "data.packing": True,
}
"""Of a checkpoint that was saved before these keys were there: what it had."""


def check_changes(changes: list[str], resumes: bool) -> None:
    """Refuse `train.resume_changes` of keys that cannot change, or without a run to resume."""
    for key in changes:
        if not resumes:
            raise Refusal(
                "train.resume_changes", changes, "it is for a resumed run; add train.resume=, or leave it out"
            )
        if key in FIXED or key.startswith("model.config."):
            remedy = f"{key} cannot change in a resumed run; {AGAIN}"
            raise Refusal("train.resume_changes", changes, remedy)
        if key not in CHANGEABLE:
            whole = f"; use {PARTS[key]}" if key in PARTS else ""
            remedy = f"{key} is none of the keys that may change{whole}: {', '.join(CHANGEABLE)}"
            raise Refusal("train.resume_changes", changes, remedy)


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The keys in which the identity of a checkpoint differs from a run's own, and those that only one of them has."""
    saved = {**SINCE, **saved}
    any_length = saved.get("train.schedule") == own["train.schedule"] == "constant"
    both = [key for key in own if key in saved and not (any_length and key == "train.steps")]
    shapes = [any(key.startswith("model.config.") for key in each) for each in (saved, own)]
    unknown = [key for key in own if key not in saved and not key.startswith("model.config.")]
    unknown += [key for key in saved if key not in own and not key.startswith("model.config.")]
    if not all(shapes):
        unknown.append("model.config")
    return [key for key in both if saved[key] != own[key]], unknown
