"""The bill of a network without bottlenecks: its switches, ports and transceivers. It imports no torch.

Every GPU has a port of its own. Up to k of them fit on one switch of k ports. More take two layers, a fat tree
(Al-Fares et al. 2008): a leaf has k/2 ports down and k/2 up, so that as much can leave it as enters, and a spine has k
ports down. Every leaf has as many links to each spine, so the number of spines divides k/2. There are k leaves of k/2
ports at most: k^2 / 2 in all. The numbers are those of NVIDIA's tables for its H100, B200 and B300
SuperPODs (docs.nvidia.com/dgx-superpod, "component counts"), which the tests hold this against.

A link has a transceiver at each end. The switches have 64 ports of 400G in 32 cages, each of which takes an 800G
transceiver for two of them (Quantum-2 QM9700), and 64 cages of 800G, for as many ports or for 128 of 400G (Spectrum-4
SN5600).
"""

from collections.abc import Iterator
from typing import NamedTuple

from harness.tables import Table


class Fabric(NamedTuple):
    """A kind of port, in Gb/s, and the ports of a switch, of which a cage takes `caged`."""

    rate: int
    radix: int
    caged: int

    @property
    def name(self) -> str:
        """As the bill calls it."""
        return f"{self.rate}G, switches of {self.radix} ports"

    @property
    def most(self) -> int:
        """The most ports of nodes that two layers take."""
        return self.radix**2 // 2


FABRICS = (Fabric(400, 64, 2), Fabric(400, 128, 2), Fabric(800, 64, 1))


class Item(NamedTuple):
    """A line of the bill: what, how many, and the formula."""

    what: str
    number: int
    formula: str


def bill(fabric: Fabric, nodes: int, gpus: int) -> list[Item]:
    """The bill for `nodes` of so many `gpus`. Raises ValueError where two layers of switches are not enough."""
    ends = nodes * gpus
    if ends > fabric.most:
        raise ValueError(
            f"{nodes:,} nodes of {gpus:,} GPUs have {ends:,} ports, and two layers of switches of {fabric.radix} ports "
            f"take {fabric.most:,} at most"
        )
    at_nodes = Item("ports of nodes", ends, f"{nodes:,} nodes x {gpus:,} GPUs")
    switches = [*_one_layer(fabric, ends)] if ends <= fabric.radix else [*_two_layers(fabric, ends)]
    return [at_nodes, *switches, *_transceivers(fabric, ends, switches)]


def _one_layer(fabric: Fabric, ends: int) -> Iterator[Item]:
    yield Item("switches", 1, f"{ends:,} <= {fabric.radix}")
    yield Item("links", ends, "one for each port of a node")


def _two_layers(fabric: Fabric, ends: int) -> Iterator[Item]:
    half = fabric.radix // 2
    leaves = -(-ends // half)
    spines = next(number for number in range(-(-leaves // 2), half + 1) if half % number == 0)
    yield Item("leaves", leaves, f"ceil({ends:,} / {half})")
    yield Item("spines", spines, f"the first divisor of {half} from {leaves:,} / 2 on")
    yield Item("links to leaves", ends, "one for each port of a node")
    yield Item("links to spines", leaves * half, f"{leaves:,} leaves x {half}")


def _transceivers(fabric: Fabric, ends: int, switches: list[Item]) -> Iterator[Item]:
    number = {item.what: item.number for item in switches}
    up, spines, caged = number.get("links to spines", 0), number.get("spines", 1), fabric.caged
    of_spine = up // spines
    at_switches = -(-ends // caged) + up // caged + spines * -(-of_spine // caged)
    yield Item("ports of switches in use", ends + 2 * up, f"{ends:,} + 2 x {up:,}" if up else f"{ends:,}")
    if caged == 1:
        ports = f"{ends + 2 * up:,} at switches"
        yield Item(f"transceivers of {fabric.rate}G", ends + at_switches, f"{ends:,} at nodes + {ports}")
        return
    yield Item(f"transceivers of {fabric.rate}G", ends, "one for each port of a node")
    down = f"ceil({ends:,} / {caged})"
    more = f" + {up:,} / {caged} + {spines} spines x ceil({of_spine} / {caged})" if up else ""
    yield Item(
        f"transceivers of {fabric.rate * caged}G",
        at_switches,
        f"at switches, for {caged} ports: {down}{more}",
    )


def bills(nodes: int, gpus: int) -> dict[str, list[Item] | str]:
    """The bill with each fabric, or the sentence that says why not. Raises ValueError where none is enough."""
    found: dict[str, list[Item] | str] = {}
    for fabric in FABRICS:
        try:
            found[fabric.name] = bill(fabric, nodes, gpus)
        except ValueError as error:
            found[fabric.name] = str(error)
            if fabric.radix == max(each.radix for each in FABRICS):
                raise
    return found


def text(nodes: int, gpus: int) -> str:
    """The bills as a table, each figure with its formula."""
    table = Table(["number"], ["formula"])
    sentences = []
    for name, items in bills(nodes, gpus).items():
        if isinstance(items, str):
            sentences.append(f"{name}: {items}.")
            continue
        table.section(
            f"{name}, {'two layers' if any(each.what == 'spines' for each in items) else 'one layer'}"
        )
        for item in items:
            table.row(f"  {item.what}", f"{item.number:,}", item.formula)
    return "\n".join([table.text(), *sentences])
