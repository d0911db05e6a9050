"""The rules for `train.optimizer_in_backward`: where a gradient is whole, and all that an update needs, in backward."""

from harness.config.rules.optimizer import USED
from harness.config.settings import Refusal, Settings

KEY = "train.optimizer_in_backward"

ALONE = tuple(kind for kind in USED if kind != "muon")
"""The kinds of optimizer whose step changes no weight without a gradient, as DeepSpeed's step has none then."""


def check(settings: Settings) -> None:
    """Raise Refusal where an update needs more than the gradient of its own weight."""
    train = settings.train
    if settings.mode == "infer" or not train.optimizer_in_backward:
        return
    for key, value, allowed, problem in (
        ("zero", settings.zero.stage, (0,), "ZeRO collects gradients in buckets of its own"),
        ("pipeline.stages", settings.pipeline.stages, (1,), "stages update after all micro-batches"),
        ("precision", settings.precision, ("fp32",), "in bf16 DeepSpeed makes fp32 gradients of all first"),
        ("train.accumulation", train.accumulation, (1,), "a gradient is whole after the last micro-batch"),
        ("train.clip", train.clip, (0,), "the norm of all gradients is known after backward"),
        ("train.nonfinite", train.nonfinite, ("stop", "ignore"), "it would skip a part of an update"),
        ("optimizer", settings.optimizer.kind, ALONE, "DeepSpeed's muon decays weights without a gradient"),
    ):
        if value not in allowed:
            remedy = f"{problem}; with {KEY}=true use {key}={' or '.join(map(str, allowed))}"
            raise Refusal(key, value, remedy)


def check_size(settings: Settings, size: int) -> None:
    """Refuse more than one rank: DeepSpeed averages gradients over ranks after backward."""
    if settings.mode == "train" and settings.train.optimizer_in_backward and size > 1:
        remedy = f"gradients of {size} ranks are averaged after backward; start one rank, or leave it out"
        raise Refusal(KEY, True, remedy)
