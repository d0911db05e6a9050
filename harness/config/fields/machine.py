"""The fields of what a run runs on: ranks, devices, networks, and the ledger that watches them."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from harness.config.fields.kinds import STRICT, Count, NotNegativeFloat, Number, Positive, PositiveFloat


@dataclass(frozen=True, config=STRICT)
class Ledger:
    mode: Literal["exact", "phases", "off"] = "exact"
    """Set by ledger=."""
    steps: Positive = 3
    """ledger=exact: how many first steps or batches are exact; ledger=phases after them."""
    trace: bool = True
    """Write every event of the exact steps to trace/, for harness report."""
    snapshot: bool = False
    """On CUDA, keep torch's own snapshot too, for memory_viz."""


@dataclass(frozen=True, config=STRICT)
class World:
    kind: Literal["torchrun", "rehearsed"] = "torchrun"
    """Set by world=."""
    size: Annotated[int, Field(ge=1, le=2**20), Number] | None = None
    """Number of ranks this config is for; any other number is refused."""
    per_node: Annotated[int, Field(ge=1, le=2**20), Number] | None = None
    """Ranks on a node; null: as torchrun started them, and in a rehearsal 8 GPUs, or all ranks of CPUs."""
    timeout: Annotated[float, Field(ge=1, le=1e8), Number] = 600.0
    """Seconds a rank waits for the others; 1e8 is three years."""


@dataclass(frozen=True, config=STRICT)
class Hardware:
    name: str = "auto"
    """The name in the record."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Auto is a GPU where there is one."""
    memory: Positive | None = None
    """Bytes of memory on a device: the vendor's, in powers of 1000; if you set it, the whole budget."""
    memory_driver: Positive | None = None
    """Bytes that nvidia-smi prints as the total, exact to a MiB; null: unknown."""
    memory_torch: Positive | None = None
    """Bytes of torch's total_memory, to a MiB for one driver, about 1% apart between drivers; null: unknown."""
    bandwidth: PositiveFloat | None = None
    """Bytes a second from the device's memory."""
    flops_bf16: PositiveFloat | None = None
    """Dense bf16 operations a second, accumulated in fp32: the peak that utilization is measured against."""
    flops_bf16_sparse: PositiveFloat | None = None
    """The same with 2:4 sparse weights: the rate that vendors print."""
    flops_fp16_accumulate: PositiveFloat | None = None
    """Dense fp16 operations a second, accumulated in fp16."""
    link: PositiveFloat | None = None
    """Bytes a second between devices, sum of both directions."""
    link_kind: Literal["nvlink", "infinity-fabric", "pcie"] | None = None
    """What connects the devices of a node; null: unknown."""
    host_link: PositiveFloat | None = None
    """Bytes a second between a device and its host, in each direction; null: half of link by PCIe, else unknown."""
    capability: PositiveFloat | None = None
    """A GPU's compute capability, as 8.9: it decides which kernels for packed weights exist."""
    multiprocessors: Positive | None = None
    """A GPU's streaming multiprocessors: some kernels take scratch for each."""
    allocator: str | None = None
    """In a rehearsal, the settings of torch's CUDA allocator; null: those in PYTORCH_ALLOC_CONF."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where a page's figures were read, by their keys."""

    @property
    def to_host(self) -> float | None:
        """Bytes a second between a device and its host, in each direction. None: not known."""
        return self.host_link or (self.between if self.link_kind == "pcie" else None)

    @property
    def between(self) -> float | None:
        """Bytes a second from a device to the others of its node. None: not known."""
        return None if self.link is None else self.link / 2


@dataclass(frozen=True, config=STRICT)
class Network:
    name: str = "auto"
    """The name in the record."""
    bandwidth: PositiveFloat | None = None
    """Bytes a second through a port, in each direction; null: unknown."""
    ports: Count | None = None
    """Ports of a node for what its devices send to other nodes; null: unknown."""
    per_node: Count | None = None
    """Devices of a node: what a rehearsal of GPUs takes world.per_node to be; null: unknown."""
    latency: NotNegativeFloat | None = None
    """Seconds that a step from one node to another takes at least; null: unknown."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where a page's figures were read, by their keys."""

    @property
    def of_node(self) -> float | None:
        """Bytes a second out of a node, and as many into it. None: not known."""
        return None if self.bandwidth is None or self.ports is None else self.bandwidth * self.ports
