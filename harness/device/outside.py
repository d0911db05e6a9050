"""What is left for torch on a card: its memory, less the CUDA context and NCCL's buffers. It imports no torch.

Each figure was measured by others, and its source is beside it; where no source was found it is None, never an
estimate. None of them was measured by this project. What they do not include: kernels that a model loads after the
first (CUDA_MODULE_LOADING=LAZY, torch's default, loads each at its first use), and what cuDNN loads.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from harness.config.settings import Hardware
from harness.tables import size

MIB = 2**20


class Measured(NamedTuple):
    """Bytes outside torch's allocator, where they were read, and how precise they are."""

    bytes: int
    source: str
    precision: str


A100_CONTEXT = Measured(
    int(0.47 * 2**30) - 2 * MIB,  # torch's own allocator has the first 2 MiB segment
    "https://github.com/stas00/ml-engineering/blob/master/training/performance/README.md",
    "0.01 GiB; torch 2.1.1, CUDA 12.1, one kernel loaded, and 0.92 GiB with all of torch's; the text names an A100, "
    "and the total that it prints, 79.15 GiB, is that of the 80 GB card",
)
RTX3090_CONTEXT = Measured(
    256 * MIB,
    "https://github.com/invoke-ai/InvokeAI/issues/9413",
    "1 MiB; torch 2.7.1, CUDA 12.8, driver 610, no kernel loaded",
)

CONTEXTS: dict[str, Measured | None] = {
    "a100-40gb": None,
    "a100-80gb": A100_CONTEXT,
    "h100-pcie": None,
    "h100-sxm": None,
    "h200": None,
    "b200": None,
    "l40s": None,
    "l4": None,
    "a10g": None,
    "t4": None,
    "rtx3090": RTX3090_CONTEXT,
    "rtx4090": None,
    "rtx5090": None,
    "mi300x": None,
}
"""The CUDA context by hardware page. It differs by card, driver, and versions of CUDA and torch."""

ISSUE_964 = "https://github.com/NVIDIA/nccl/issues/964"
TWO_A100 = Measured(544 * MIB, ISSUE_964, "1 MB, taken for MiB; one communicator, all-reduce, NVLink")
MORE_A100 = Measured(688 * MIB, ISSUE_964, "1 MB, taken for MiB; one communicator, all-reduce, NVLink")

NCCL: dict[tuple[str, int], Measured] = {
    (card, ranks): TWO_A100 if ranks == 2 else MORE_A100
    for card in ("a100-40gb", "a100-80gb")
    for ranks in (2, 3, 4)
}
"""The device memory of one NCCL communicator, by hardware page and number of ranks, all on one node.

No formula is used. A connection has a buffer of NCCL_BUFFSIZE (4 MiB, unless set) in each channel, and those of the
other protocols, but the numbers of channels and connections are NCCL's choice: it takes more of them for faster links
and for all-to-all, and a further communicator has its own
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-buffsize,
https://github.com/NVIDIA/nccl/issues/986). Even a communicator of one rank may have some
(https://github.com/NVIDIA/nccl/issues/2363).
"""


class Outside(NamedTuple):
    """What is on a card besides torch's allocator: the CUDA context and NCCL's buffers. None: no source was found."""

    context: Measured | None
    nccl: Measured | None

    @property
    def bytes(self) -> int:
        """The sum of what is known."""
        return sum(each.bytes for each in self if each is not None)


def outside(hardware_name: str, world_size: int) -> Outside:
    """What lies outside torch on the card of the hardware page `hardware_name`, in a world of `world_size` ranks.

    A card that is not in the tables, as one of your own page, has None for both. Raises ValueError for a world of
    less than one rank.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: a world has one rank or more")
    return Outside(CONTEXTS.get(hardware_name), NCCL.get((hardware_name, world_size)))


class Budget(NamedTuple):
    """The memory of a device that torch can allocate, in bytes, and how it was formed.

    `total` is what `source` reports: torch on such a card, its driver, or the `hardware.memory` of the config, from
    which nothing is subtracted. `outside` is None there, and on a CPU.
    """

    total: int
    source: Literal["torch", "driver", "hardware.memory"]
    outside: Outside | None

    @property
    def bytes(self) -> int:
        """What torch can allocate: the total, less what is known to lie outside torch."""
        return self.total - (self.outside.bytes if self.outside else 0)

    def sentence(self) -> str:
        """How the budget was formed, with the sources of what was subtracted."""
        return f"{size(self.bytes)} a device: {'; '.join(self._parts())}"

    def _parts(self) -> Iterator[str]:
        if self.outside is None:
            yield "hardware.memory, and nothing is subtracted"
            return
        seer = {"torch": "that torch sees", "driver": "that nvidia-smi prints"}[self.source]
        names = {"CUDA context": self.outside.context, "NCCL": self.outside.nccl}
        known = [f"{size(each.bytes)} of {name} ({each.source})" for name, each in names.items() if each]
        yield f"{size(self.total)} {seer}" + (f", less {' and '.join(known)}" if known else "")
        if unknown := [name for name, each in names.items() if each is None]:
            yield f"{' and '.join(unknown)}: not known here and not subtracted; --reserve is for it"


def budget(hardware: Hardware, world_size: int) -> Budget | None:
    """The memory for torch on a device of `hardware`, in a world of `world_size` ranks. None where the config has none.

    Where the page has torch's figure it counts, else the driver's, else `hardware.memory`, the vendor's or the user's.
    """
    beside = outside(hardware.name, world_size) if hardware.device == "cuda" else None
    if beside is not None and hardware.memory_torch is not None:
        return Budget(hardware.memory_torch, "torch", beside)
    if beside is not None and hardware.memory_driver is not None:
        return Budget(hardware.memory_driver, "driver", beside)
    return None if hardware.memory is None else Budget(hardware.memory, "hardware.memory", None)
