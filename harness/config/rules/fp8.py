"""The rules of `precision=fp8`. Which layers of a model can multiply in 8 bits, `training/fp8.py` finds out."""

from harness.config.rules import packages
from harness.config.settings import Refusal, Settings

ROW = 16
"""Rows and columns of a product in 8 bits come in so many: cublasLt's rule for matrices of fp8."""

CAPABILITY = 8.9
"""The least compute capability of a GPU that multiplies in 8 bits: NVIDIA's Ada."""


def check(settings: Settings) -> None:
    """Refuse fp8 where it cannot be, as far as that is known without torch."""
    if settings.precision != "fp8":
        return
    if settings.mode == "infer":
        remedy = (
            "it is for training, whose products it rounds; generate with bf16, or from a checkpoint in fp8"
        )
        raise Refusal("precision", "fp8", remedy)
    check_device(_device(settings), settings.hardware.capability)
    packages.check("precision", "fp8", "torchao", "fp8", instead=", or use precision=bf16")
    if settings.adapter.kind != "none" or settings.adapter.path is not None:
        # peft's layers are no plain linear layers, and torchao would convert the small matrices inside of them
        raise Refusal("precision", "fp8", "an adapter's layers are not converted; use bf16, or adapter=none")
    sequence = settings.train.sequence
    if sequence % ROW:
        remedy = (
            f"fp8 multiplies multiples of {ROW} tokens; use {-(-sequence // ROW) * ROW}, or precision=bf16"
        )
        raise Refusal("train.sequence", sequence, remedy)


def _device(settings: Settings) -> str:
    """A rehearsal for no GPU is one for a CPU."""
    device = settings.hardware.device
    return "cpu" if settings.world.kind == "rehearsed" and device == "auto" else device


def check_device(device: str, capability: float | None) -> None:
    """Refuse fp8 on `device` ("auto", "cpu" or "cuda") where that has no units for it, as far as that is known."""
    if device == "cpu":
        remedy = "it is for a GPU, and this is a CPU; use bf16, or rehearse a GPU, as by hardware=h100-sxm"
        raise Refusal("precision", "fp8", remedy)
    if capability is not None and capability < CAPABILITY:
        remedy = f"a GPU of compute capability {capability:g} has no units for it, as from {CAPABILITY:g} on; use bf16"
        raise Refusal("precision", "fp8", remedy)
