"""Which link a transfer crosses, and how many bytes of it a library sends. It imports no torch.

Bytes on the wire are those that one rank sends of a payload of S bytes among n ranks, at least. By ring: an all-reduce
sends 2 S (n - 1) / n, an all-gather, a reduce-scatter, an all-to-all, a gather and a scatter S (n - 1) / n, a broadcast
and a reduce S (NCCL's tests, doc/PERFORMANCE.md). By NCCL's double binary tree, an all-reduce sends S up and S down.
NCCL has no tree for the others, and a message between two ranks has neither.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from harness.config.settings import Settings

STORAGE, HOST_MEMORY, PCIE, NETWORK = "storage", "host-memory", "pcie", "network"

LINKS = (STORAGE, HOST_MEMORY, PCIE, "nvlink", "infinity-fabric", NETWORK)
"""The links, from a rank outward."""

TWICE = ("all-reduce",)
SHARED = ("all-gather", "reduce-scatter", "all-to-all", "gather", "scatter")
WHOLE = ("broadcast", "reduce")


class Nodes(NamedTuple):
    """Where ranks are: `per_node` consecutive ones on each node, with devices of a kind that `link` connects.

    None: not known.
    """

    per_node: int | None
    device: str
    link: str | None

    def of(self, operation: str, ranks: Sequence[int]) -> str | None:
        """The slowest link that `operation` crosses among `ranks`. None: it is not known."""
        if operation in ("read", "write"):
            return STORAGE
        if operation in ("host-to-device", "device-to-host"):
            return PCIE
        if len(ranks) > 1 and self.per_node is None:
            return None
        if len({rank // (self.per_node or 1) for rank in ranks}) > 1:
            return NETWORK
        return HOST_MEMORY if self.device == "cpu" else self.link


def nodes_of(settings: "Settings", device: str = "", device_name: str = "") -> Nodes:
    """Where the ranks of a run of `settings` are, whose `per_node` is decided. A real run knows its `device`."""
    from harness.config import hardware_page  # it reads YAML, which no reader of records needs

    link: str | None = settings.hardware.link_kind
    if link is None and device == "cuda":
        link = hardware_page.link_of(device_name)
    return Nodes(settings.world.per_node, device or settings.hardware.device.replace("auto", "cpu"), link)


def by_ring(operation: str, payload: int, ranks: int) -> int | None:
    """Bytes that a rank sends by ring, rounded up. None: a ring does not do that."""
    if operation in WHOLE:
        return payload if ranks > 1 else 0
    times = 2 if operation in TWICE else 1 if operation in SHARED else None
    return None if times is None or not ranks else -(-times * payload * (ranks - 1) // ranks)


def by_tree(operation: str, payload: int, ranks: int) -> int | None:
    """Bytes that a rank sends by a double binary tree. None: NCCL has none for that."""
    return 2 * payload if operation in TWICE and ranks > 1 else None


def as_text(ranks: Sequence[int]) -> str:
    """`ranks`, in order, as `0-7`, with a distance `0-56:8`, or as a list `0,3,4`; empty for none."""
    steps = {later - earlier for earlier, later in pairwise(ranks)}
    if len(ranks) < 3 or len(steps) != 1 or min(steps) < 1:
        return ",".join(map(str, ranks))
    step = steps.pop()
    return f"{ranks[0]}-{ranks[-1]}" + f":{step}" * (step != 1)
