"""The device of a rehearsal for a GPU: `cuda:0`, which is not there.

Python sees fake tensors on `cuda:0`, with CUDA's dispatch keys, so that decompositions, autocast and optimizers do what
they do on a GPU. Only autograd in C++ must not: without CUDA it has no streams, and stops. C++ asks for a fake tensor's
device by the operator `prim.device`, which Python does not use, and the answer is `cpu:0`, which has no other use: the
host is `cpu`, without an index.
"""

from typing import Any

import torch

CARD = torch.device("cuda", 0)
"""The card, as Python sees it."""

CARD_IN_CPP = torch.device("cpu", 0)
"""The card, as C++ sees it."""


def in_cpp(device: torch.device) -> torch.device:
    """The answer to C++, which asks for the device of a tensor on `device`."""
    return CARD_IN_CPP if device == CARD else device


def in_python(device: Any) -> Any:
    """The device that an operator's argument `device` means. It may come from C++, and may have no index.

    Raises RuntimeError for another card.
    """
    if isinstance(device, str):
        device = torch.device(device)
    if device in (CARD_IN_CPP, torch.device("cuda")):
        return CARD
    if device is not None and device.type == "cuda" and device != CARD:
        raise RuntimeError(
            f"{device} is not there: a rehearsal has one card, cuda:0; rehearse each by itself"
        )
    return device
