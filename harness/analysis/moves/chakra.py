"""A step as Chakra execution traces, which ASTRA-sim and MLCommons' tools read: one file for each rank.

A record has the order of phases, and how often each operation ran in them with how many bytes. So the calls of a phase
are spread evenly over it, each with an equal share of the bytes; its work is in as many pieces as its most frequent
operation has calls. Each node waits for the one before it: a simulator's time is that of a step in which no rank
overlaps anything.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from harness.analysis.moves import chakra_schema
from harness.analysis.moves.chakra_schema import COLLECTIVES
from harness.analysis.moves.transfers import members, missing, of_step, phases_of_step
from harness.record.links import as_text
from harness.record.memory import Phase, Rank, Transfer
from harness.record.schema import Record
from harness.runtime.files import folder, put, whole

PREFIX = "chakra"
GROUPS = f"{PREFIX}.groups.json"
"""The ranks of each group, by its number: ASTRA-sim's `--comm-group-configuration`."""

FIRST = ("read", "host-to-device", "receive", "all-gather", "broadcast", "scatter")
"""What work waits for; the rest waits for the work."""

MEMORY = {
    "read": "mem-load",
    "host-to-device": "mem-load",
    "write": "mem-store",
    "device-to-host": "mem-store",
}
"""What reaches a memory beyond the device's own."""

MOST = 10**6
"""The most calls of a rank in a step that a trace has: about 100 MB of nodes."""

WORK = None
"""In place of a transfer: a piece of the phase's work."""


class Call(NamedTuple):
    """The call `number` of the `calls` of a transfer in its phase."""

    row: Transfer | None
    number: int
    calls: int

    @property
    def order(self) -> tuple[float, int]:
        """When it is in its phase; among those of one moment, what work waits for comes first."""
        turn = 1 if self.row is WORK else 0 if self.row.operation in FIRST else 2
        return self.number / self.calls, turn

    def share(self, total: int) -> int:
        """This call's part of `total`, so that all calls have all of it."""
        return total * (self.number + 1) // self.calls - total * self.number // self.calls


class Groups:
    """The groups of a run of `size` ranks, numbered from 1 as they are met. The group of all ranks has no number."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._numbers: dict[tuple[int, ...], int] = {}

    def name(self, ranks: Sequence[int]) -> dict[str, str]:
        """The attribute that names the group of `ranks`; none for all ranks."""
        if len(ranks) == self._size:
            return {}
        return {"pg_name": str(self._numbers.setdefault(tuple(ranks), len(self._numbers) + 1))}

    def as_json(self) -> str:
        """The ranks of each group by its number."""
        return json.dumps({str(number): ranks for ranks, number in self._numbers.items()}, indent=0)


class Traced(Protocol):
    """A run: its name, its path as printable text, and its record."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def record(self) -> Record: ...


def chakra(runs: Sequence[Traced], directory: Path) -> list[Path]:
    """Write each run's traces to `directory`/chakra, of several runs each to a directory there; returns those.

    Raises ValueError where there is no protobuf, or a run's traffic was not counted.
    """
    try:
        chakra_schema.messages()
    except ImportError:
        raise ValueError("--chakra: it needs protobuf; pip install 'harness[chakra]'") from None
    places = []
    for index, run in enumerate(runs):
        name = re.sub(r"[^\w.=-]+", "_", run.name)[:50]
        places.append(directory.joinpath(PREFIX, *([f"{index}-{name}"] if len(runs) > 1 else [])))
        try:
            said = write(run.record, places[-1])
        except ValueError as error:
            raise ValueError(f"--chakra: {run.path}: {error}") from None
        for sentence in said:
            print(f"harness: --chakra: {run.name}: {sentence}", file=sys.stderr)
    return places


def write(record: Record, directory: Path) -> list[str]:
    """Write a step of each rank as `chakra.RANK.et`, and `chakra.groups.json`. Returns sentences on what is not exact.

    Raises ValueError where traffic was not counted, and NotWritten.
    """
    if not record.ranks or any(rank.traffic is None for rank in record.ranks):
        raise ValueError(f"its record has no traffic; {missing(record)}")
    for rank in record.ranks:
        if (calls := sum(row.calls for row in of_step(record, rank) or ())) > MOST:
            raise ValueError(f"rank {rank.rank} has {calls:,} calls in a step, and a trace at most {MOST:,}")
    folder(directory)
    for old in directory.glob(f"{PREFIX}.*.et"):  # of a larger world, perhaps
        old.unlink()
    groups = Groups(record.world.size)
    written = set[int]()
    for rank in record.ranks:
        for number in (*rank.numbers, *rank.bounds):
            if all(peers(row, rank.rank, number) is not None for row in of_step(record, rank) or ()):
                with whole(directory / f"{PREFIX}.{number}.et") as partial, partial.open("wb") as stream:
                    chakra_schema.write(stream, nodes(record, rank, number, groups))
                written.add(number)
    put(directory / GROUPS, groups.as_json())
    return list(_inexact(record, written))


def _inexact(record: Record, written: set[int]) -> Iterator[str]:
    """What the traces of a step do not have from the run itself."""
    alike = sorted(written & {number for rank in record.ranks for number in rank.bounds})
    if alike:
        yield (
            f"ranks {as_text(alike)} were not rehearsed, because they peak no higher than another; "
            "their traces have what that one moves"
        )
    absent = [number for number in range(record.world.size) if number not in written]
    if absent:
        yield f"ranks {as_text(absent)} have no trace: the record does not say what moves there, or in which groups"


def nodes(record: Record, rank: Rank, number: int, groups: Groups) -> Iterator[Any]:
    """What the rank `number`, for which `rank` stands, does in a step. Raises ValueError for a peer that is not known.

    A collective of one rank moves nothing and has no node.
    """
    count = 0
    for place, phase, rows in _phases(record, rank):
        for call in _calls(phase, rows):
            after = count - 1 if count else None
            if call.row is WORK:
                kind, about = "compute", _work(call, phase)
            else:
                kind, about = _moved(call, call.row, peers(call.row, rank.rank, number) or (), number, groups)
            name = f"{place}, {call.row.operation if call.row else 'work'}"
            yield chakra_schema.node(count, name, kind, after, is_cpu_op=False, **about)
            count += 1


def _phases(record: Record, rank: Rank) -> Iterator[tuple[str, Phase | None, list[Transfer]]]:
    """Each phase of a step in order, as text, with its work and what moves in it."""
    phases = {(each.phase, each.micro_batch): each for each in phases_of_step(record, rank)}
    rows: dict[tuple[str, int], list[Transfer]] = {key: [] for key in phases}
    for row in of_step(record, rank) or ():
        if row.operation not in COLLECTIVES or row.ranks > 1:
            rows.setdefault((row.phase, row.micro_batch), []).append(row)
    for key, each in rows.items():
        yield f"{key[0]} {key[1]}", phases.get(key), each


def _calls(phase: Phase | None, rows: Sequence[Transfer]) -> list[Call]:
    """The calls of a phase in order, with its work between them, if that was counted."""
    counts: list[tuple[Transfer | None, int]] = [(row, row.calls) for row in rows]
    if phase is not None and phase.flops is not None and phase.moved:
        counts.append((WORK, max((row.calls for row in rows), default=1) or 1))
    calls = (Call(row, index, count) for row, count in counts for index in range(count))
    return sorted(calls, key=lambda call: call.order)


def _work(call: Call, phase: Phase | None) -> dict[str, int]:
    """A piece of the phase's operations, and of the bytes that they move."""
    flops, moved = (0, 0) if phase is None else (phase.flops or 0, phase.moved or 0)
    return {"num_ops": call.share(flops), "tensor_size": call.share(moved)}


def _moved(
    call: Call, row: Transfer, ranks: Sequence[int], number: int, groups: Groups
) -> tuple[str, dict[str, Any]]:
    """The kind of a transfer's node, and its attributes."""
    if row.operation in MEMORY:
        return MEMORY[row.operation], {"tensor_size": call.share(row.bytes)}
    if row.operation in COLLECTIVES:
        about = {"comm_type": COLLECTIVES[row.operation], "comm_size": call.share(_taken(row))}
        return "collective", about | groups.name(ranks)
    others = [each for each in ranks if each != number]
    if len(others) != 1:
        raise ValueError(f"a message of rank {number} in {row} has no other rank that is known")
    source, target = (number, others[0]) if row.operation == "send" else (others[0], number)
    about = {"comm_src": source, "comm_dst": target, "comm_tag": row.micro_batch}
    return row.operation, about | {"comm_size": call.share(row.bytes)}


def _taken(row: Transfer) -> int:
    """The bytes that a rank gives to a collective, as Chakra has it: of an all-gather and a gather its own part."""
    return -(-row.bytes // row.ranks) if row.operation in ("all-gather", "gather") else row.bytes


def peers(row: Transfer, own: int, other: int) -> tuple[int, ...] | None:
    """The group in which the rank `other` does what the rank `own` does in `row`. None: it cannot be derived.

    Groups lie side by side: those of 4 ranks with a distance of 2 are 0-6:2 and 1-7:2, then 8-14:2. Messages go as far.
    """
    ranks = tuple(members(row.group))
    if other == own or not ranks:
        return ranks
    if row.operation in ("send", "receive"):
        return tuple(rank + other - own for rank in ranks)
    if other in ranks:
        return ranks
    distance = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if distance < 1:
        return None
    return _beside(other, distance, len(ranks)) if _beside(own, distance, len(ranks)) == ranks else None


def _beside(rank: int, distance: int, count: int) -> tuple[int, ...]:
    """Of the groups of `count` ranks with this `distance`, laid side by side from rank 0, the one that has `rank`."""
    block = distance * count
    first = rank // block * block + rank % distance
    return tuple(range(first, first + block, distance))
