"""Compares what a test moved with its budget by link, and words the failures for the pytest plugin."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.analysis.moves.transfers import flows, gaps, largest
from harness.check.marks import ALL_LINKS, BUDGET, PER_NODE, TRAFFIC, Request
from harness.config import hardware_page
from harness.record import record_file
from harness.record.links import PCIE, Nodes
from harness.record.memory import Transfer
from harness.runtime.launcher import per_node
from harness.tables import size

if TYPE_CHECKING:
    from harness.ledger import Ledger


def exceeded(ledger: "Ledger", request: Request) -> Iterator[str]:
    """A sentence for each link over which more was moved than `request` allows, or where that cannot be judged."""
    if not request.traffic:
        return
    nodes = _nodes(ledger, request)
    rank = record_file.rank_record(ledger, 0, nodes=nodes)
    rows, missing = rank.traffic or [], gaps(rank)
    if rank.traffic is None:
        missing = missing or rank.unseen
    for link, limit in request.traffic.items():
        moved = [row for row in rows if link in (ALL_LINKS, row.link)]
        perhaps = [row for row in rows if row.link is None and link not in (ALL_LINKS, PCIE)]
        total, unknown = _bytes(moved), _bytes(perhaps)
        if total > limit:
            more = f"{size(total - limit)} over its budget of {size(limit)}"
            yield f"the test moved {size(total)} over {_named(link)}, {more}; {_most(moved)}"
        elif missing:
            yield f"{_mark(link, limit)} cannot be judged: {missing[0]}"
        elif total + unknown > limit:
            remedy = (
                f"{PER_NODE}= says how many ranks are on a node"
                if nodes.per_node is None
                else "the GPU's page does not name its link"
            )
            yield f"{_mark(link, limit)} cannot be judged: which link {size(unknown)} cross is not known; {remedy}"


def _nodes(ledger: "Ledger", request: Request) -> Nodes:
    """Where the test's ranks are: as its mark says, or as torchrun does."""
    link: str | None = None if request.hardware is None else hardware_page.gpu(request.hardware).link_kind
    if request.hardware is None and ledger.device == "cuda":
        import torch  # a GPU is in use

        link = hardware_page.link_of(torch.cuda.get_device_name())
    return Nodes(request.per_node or per_node(), "cpu" if ledger.device == "cpu" else "cuda", link)


def _bytes(rows: list[Transfer]) -> int:
    return sum(row.bytes for row in rows)


def _named(link: str) -> str:
    return "all links" if link == ALL_LINKS else link


def _mark(link: str, limit: int) -> str:
    return f"{BUDGET}({TRAFFIC}={{{link!r}: {size(limit)!r}}})"


def _most(moved: list[Transfer]) -> str:
    """The operation and phase that moved most, and what for."""
    most = max(flows(moved), key=lambda flow: flow.bytes)
    same = [row for row in moved if (row.phase, row.operation) == (most.phase, most.operation)]
    cause = "".join(f", most for {name}" for name, _ in largest(same, 1))
    return f"most by {most.operation} in {most.phase}, {size(most.bytes)} in {most.calls} calls{cause}"
