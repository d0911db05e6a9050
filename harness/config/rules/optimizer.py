"""The rules for `optimizer`: what each kind of it needs, and where DeepSpeed's ZeRO would make another one of it."""

from harness.config.rules import packages
from harness.config.settings import Refusal, Settings, Train

KEY = "optimizer"

USED = {
    "adamw": ("betas", "epsilon", "fused"),
    "adamw_8bit": ("betas", "epsilon"),
    "adafactor": (),
    "muon": ("betas", "epsilon"),
    "sgd": ("fused",),
    "lion": ("betas",),
}
"""For each kind, which of `train.betas`, `train.epsilon` and `train.fused` it reads."""

MOMENTUM = {"sgd": 0.0, "muon": 0.95}
"""The kinds with `optimizer.momentum`, and what null is."""

LIBRARY = "bitsandbytes"
BY_LIBRARY = ("adamw_8bit", "lion")
"""The kinds that the extra `optimizers` of pyproject.toml brings."""

IN_BF16 = ("adamw", "sgd", "muon")
"""The kinds whose moments have the dtype of the weights that they update."""


def check(settings: Settings) -> None:
    """Raise Refusal for an optimizer that cannot be, or would not be itself, and for options that it does not read."""
    if settings.mode == "infer":
        return
    _options(settings)
    _library(settings)
    _matrices(settings)
    _muon(settings)
    _state(settings)


def _options(settings: Settings) -> None:
    kind, train, own = settings.optimizer.kind, settings.train, Train()
    for name in ("betas", "epsilon", "fused"):
        value = getattr(train, name)
        if value != getattr(own, name) and name not in USED[kind]:
            others = ", ".join(each for each, names in USED.items() if name in names)
            listed = list(value) if isinstance(value, tuple) else value
            raise Refusal(
                f"train.{name}", listed, f"optimizer={kind} has none; leave it out, or use {others}"
            )
    momentum = settings.optimizer.momentum
    if momentum is not None and kind not in MOMENTUM:
        remedy = f"optimizer={kind} has none; leave it out, or use {' or '.join(MOMENTUM)}"
        raise Refusal("optimizer.momentum", momentum, remedy)


def _library(settings: Settings) -> None:
    kind = settings.optimizer.kind
    if kind in BY_LIBRARY:
        packages.check(KEY, kind, LIBRARY, "optimizers")


def _matrices(settings: Settings) -> None:
    """Refuse a kind that needs whole matrices where DeepSpeed gives it flat parts of all weights."""
    kind, zero, stages = settings.optimizer.kind, settings.zero, settings.pipeline.stages
    if kind not in ("adafactor", "muon"):
        return
    if stages > 1 and (zero.stage or settings.precision in ("bf16", "fp8")):
        flat = f"zero={zero.stage}" if zero.stage else f"precision={settings.precision}"
        remedy = f"with pipeline.stages={stages} and {flat}, DeepSpeed updates flat parts of all weights, and it needs "
        raise Refusal(KEY, kind, f"{remedy}whole matrices; use zero=0 precision=fp32")
    if kind == "adafactor" and zero.stage:
        remedy = (
            f"zero={zero.stage} updates flat parts of all weights, and it needs whole matrices; use zero=0"
        )
        raise Refusal(KEY, kind, remedy)


def _muon(settings: Settings) -> None:
    """Refuse what ZeRO would do to Muon's updates in the place of its gradients.

    DeepSpeed (0.19) orthogonalizes before it takes the norm, so it would clip updates, and has moved the momentum
    before a step can be left out.
    """
    train, zero = settings.train, settings.zero
    if settings.optimizer.kind != "muon" or not zero.stage:
        return
    if train.clip:
        remedy = f"with zero={zero.stage} DeepSpeed clips muon's updates, not its gradients; use train.clip=0"
        raise Refusal("train.clip", train.clip, remedy)
    if train.nonfinite == "skip":
        remedy = f"with zero={zero.stage} muon's momentum moves before a step is left out; use train.nonfinite=stop"
        raise Refusal("train.nonfinite", "skip", remedy)
    if zero.offload != "none":
        remedy = "muon computes where gradients are; use zero.offload=none"
        raise Refusal("zero.offload", zero.offload, remedy)


def _state(settings: Settings) -> None:
    """Refuse states in bf16 where DeepSpeed keeps them in fp32, or the kind does."""
    if settings.optimizer.state == "fp32":
        return
    kind, zero = settings.optimizer.kind, settings.zero
    for problem, remedy in (
        (settings.precision == "fp32", "weights in fp32 are their own master weights; use precision=bf16"),
        (kind not in IN_BF16, f"optimizer={kind} has moments of its own; use {', '.join(IN_BF16)}"),
        (zero.stage == 0, "without ZeRO DeepSpeed has fp32 master weights alone; use zero=1, 2 or 3"),
        (
            zero.offload != "none",
            f"zero.offload={zero.offload} takes DeepSpeed's own AdamW, which is compiled; use zero.offload=none",
        ),
    ):
        if problem:
            raise Refusal("optimizer.state", "bf16", remedy)
