"""x"""
from pathlib import Path
from typing import NamedTuple
OPERATORS = Path(__file__).parents[2] / "profiles" / "speed" / "operators.csv"
class Timed(NamedTuple):
    a: int
PAGES = {
    "A100": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA B200": "b200",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "sm_90": "h100-sxm",
}
