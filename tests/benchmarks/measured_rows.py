"""`measured_operators.csv`: peaks that Liger-Kernel's benchmarks measured on GPUs."""

import csv
import json
import struct
from collections.abc import Callable
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CSV = Path(__file__).parent / "measured_operators.csv"
HELD_OUT = Path(__file__).parent / "measured_heldout.csv"
"""Rows that nobody looked at while the rules were written."""
HARDWARE = {
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA B200": "b200",
}
"""The page under `conf/hardware` of each GPU, by the name that CUDA gives it."""
CUDA = "cuda"
MIB = 2**20

Measure = Callable[[Callable[[], object]], int]
"""Bytes: the most that was allocated within a call."""


class Row(NamedTuple):
    """A line of `measured_operators.csv`; `config` are the sizes that are the same for all of `x_name`'s values."""

    kernel: str
    provider: str
    mode: str
    x_name: str
    x_value: int
    peak_mib: float
    config: dict[str, Any]
    gpu: str
    date: str
    version: str

    def size(self, name: str) -> int:
        """The size `name` of the benchmark's configuration, which may be the one that the rows vary."""
        return self.x_value if name == self.x_name else int(self.config[name])

    @property
    def dtype(self) -> torch.dtype:
        """Raises KeyError where the benchmark has no such setting."""
        return {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[self.config["dtype"]]

    @property
    def published(self) -> int:
        """Bytes of `peak_mib`."""
        return round(self.peak_mib * MIB)

    @property
    def interval(self) -> tuple[int, int]:
        """The least and the most bytes whose MiB are `peak_mib` in float32, as the benchmark rounds them."""
        (bits,) = struct.unpack("I", struct.pack("f", self.peak_mib))
        below, above = (struct.unpack("f", struct.pack("I", bits + step))[0] for step in (-1, 1))
        return ceil((self.peak_mib + below) / 2 * MIB), floor((self.peak_mib + above) / 2 * MIB)


def read(path: Path = CSV) -> list[Row]:
    """Every row of the file at `path`, in its order."""
    with path.open(encoding="utf-8") as file:
        lines = csv.DictReader(line for line in file if not line.startswith("#"))
        return [
            Row(
                **{
                    name: line[name]
                    for name in ("kernel", "provider", "mode", "x_name", "gpu", "date", "version")
                },
                x_value=int(line["x_value"]),
                peak_mib=float(line["peak_mib"]),
                config=json.loads(line["config"]),
            )
            for line in lines
        ]


def in_mode(row: Row, measure: Measure, forward: Callable[[], Tensor]) -> int:
    """Of `forward`, of the backward of a forward done before, or of both; each backward keeps its graph."""
    if row.mode == "forward":
        return measure(forward)
    if row.mode == "backward":
        output = forward()
        gradient = torch.randn_like(output)
        return measure(lambda: output.backward(gradient, retain_graph=True))

    def full() -> None:
        output = forward()
        output.backward(torch.randn_like(output), retain_graph=True)

    return measure(full)


def on_states(layer: nn.Module, shape: tuple[int, ...], row: Row, measure: Measure) -> int:
    """Of a layer's forward and a backward that keeps its graph, with a gradient that is there before."""
    states = torch.randn(shape, dtype=row.dtype, device=CUDA)
    gradient = torch.randn_like(states)
    states.requires_grad_(True)

    def full() -> None:
        output = layer(states)
        output.backward(gradient, retain_graph=True)

    return measure(full)
