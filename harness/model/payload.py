"""What a rank reads of a checkpoint's weights, by the headers of its files."""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from harness.config.settings import Model
from harness.model.loader import directory_of


def payload(settings: Model, own: Mapping[str, Tensor], read: bool) -> dict[str, int]:
    """Bytes by tensor that a rank with the parameters `own` reads of the checkpoint of `settings`.

    Empty where it reads none. Where transformers renames tensors as it loads them, a rank reads all.
    """
    if settings.path is None or settings.random or not read:
        return {}
    stored: dict[str, tuple[int, int]] = {}
    for file in sorted(directory_of(settings.path).glob("*.safetensors")):
        stored |= dict(_tensors(file))
    if not own.keys() <= stored.keys():
        return {name: nbytes for name, (nbytes, _) in stored.items()}
    return {name: stored[name][0] * _elements(each) // stored[name][1] for name, each in own.items()}


def _tensors(file: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """The bytes and elements of each tensor in a safetensors file."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for name, each in header.items():
        if name != "__metadata__":
            begin, end = each["data_offsets"]
            yield name, (end - begin, max(1, prod(each["shape"])))


def _elements(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()
