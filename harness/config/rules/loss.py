"""The rules of `loss`. Whether a model's loss can be computed so, `training/loss_check.py` finds out."""

from harness.config.rules import packages
from harness.config.rules.packages import version
from harness.config.settings import Refusal, Settings

TORCH = (2, 13)
"""The first release of torch that computes a loss chunk by chunk."""


def check(settings: Settings) -> None:
    """Refuse a loss that cannot be, as far as that is known without torch."""
    kind, chunk, train = settings.loss.kind, settings.loss.chunk, settings.train
    if settings.mode == "infer" and kind != "full":
        raise Refusal("loss", kind, "inference has no loss; use loss=full")
    if kind == "fused":
        _fused(settings)
    if chunk is not None and kind != "chunked":
        raise Refusal("loss.chunk", chunk, f"loss={kind} has no chunks to choose; use loss=chunked")
    tokens = train.micro_batch * train.sequence
    if chunk is not None and chunk >= tokens:
        product = f"train.micro_batch={train.micro_batch} by train.sequence={train.sequence}"
        remedy = f"{product} are {tokens} tokens; give fewer, or use loss=full"
        raise Refusal("loss.chunk", chunk, remedy)
    if kind == "chunked" and _release() < TORCH:
        remedy = (
            f"it needs torch {'.'.join(map(str, TORCH))}, and {version('torch')} is installed; use loss=full"
        )
        raise Refusal("loss", kind, remedy)


def _fused(settings: Settings) -> None:
    if settings.world.kind == "rehearsed":
        remedy = "its kernels take no fake tensors, so it cannot be rehearsed; use loss=chunked or full"
        raise Refusal("loss", "fused", remedy)
    check_device(settings, settings.hardware.device)
    for package in ("liger_kernel", "triton"):
        packages.check("loss", "fused", package, "fused", instead=", or use loss=chunked")


def check_device(settings: Settings, device: str) -> None:
    """Refuse a loss that `device` ("auto", "cpu" or "cuda") cannot compute."""
    if settings.loss.kind == "fused" and device == "cpu":
        raise Refusal("loss", "fused", "its kernels are for a GPU, and this is a CPU; use loss=chunked")


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in version("torch").split(".")[:2])
