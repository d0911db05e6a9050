"""The compute capability of a GPU, as 8.9: this machine's, or that of the page that is rehearsed."""

import torch

from harness.config.settings import Settings


def of_this_gpu() -> float:
    """That of the current GPU. It has never run on CUDA."""
    major, minor = torch.cuda.get_device_capability()
    return major + minor / 10


def capability(settings: Settings, device: str) -> float | None:
    """That of the GPU on which `settings` run: of `device` ("cpu" or "cuda"), or of their page. None: not known."""
    if device == "cuda" and settings.world.kind != "rehearsed":
        return of_this_gpu()
    return settings.hardware.capability
