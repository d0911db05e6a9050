"""`record.json` of a run. The file is complete at every moment, and `failed` until the run has finished."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.ledger.categories import CATEGORIES
from harness.record import memory
from harness.record.fields import short_repr
from harness.record.links import Nodes
from harness.record.places import FILE as FILE
from harness.record.places import as_path, check_inside
from harness.record.results import Model, Results
from harness.record.schema import Environment, Failure, Record, Shortage, World
from harness.record.transfers import transfers
from harness.runtime.files import create, put
from harness.runtime.trackers import Trackers

if TYPE_CHECKING:
    from harness.ledger import Forwards, Holding, Ledger, Peak, Phase, Where, Work
    from harness.ledger.on_host import MostOnHost
    from harness.ledger.reconcile import Reservation
    from harness.runtime import failure

SCHEMA = "harness.record/1"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "hydra-core")


@dataclass(frozen=True)
class Output:
    """What a mode uses to write its output."""

    directory: Path
    say: Callable[[str], None]  # prints a line, on rank 0
    results: Results  # filled during the run
    flush: Callable[[], None]  # write the record so far to disk
    trackers: Trackers = field(default_factory=Trackers)  # who else gets the figures, on rank 0
    # whether all ranks end after this step, because a signal has asked them to; asked by all after each step
    stops_after: Callable[[int], bool] = lambda step: False


def head(settings: Any, reasons: Mapping[str, str], command: Sequence[str], world: World) -> Record:
    """The record of a run of `settings` before it begins. Its status is `failed` until the run is complete."""
    return Record(
        status="failed",
        mode=settings.mode,
        world=world,
        model=Model(name=settings.model.name, parameters=None, dtype=None),
        config=asdict(settings),
        resolved=dict(reasons),
        environment=environment(command),
        ranks=[],
    )


def environment(command: Sequence[str] = ()) -> Environment:
    """The versions and the machine of the run, and its command line."""
    import torch

    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor(),
        threads=torch.get_num_threads(),
        packages={name: _version(name) for name in PACKAGES},
        command=list(command),
    )


def rank_record(
    ledger: "Ledger", rank: int, stage: int = 0, share: int = 0, nodes: Nodes | None = None
) -> memory.Rank:
    """The record of one rank. What was not measured is None. `nodes` says where the ranks are."""
    account = ledger.account()
    unknown = memory.Category(peak=None, end=None)
    own = {name: memory.Category(peak=each.peak, end=each.end) for name, each in account.categories.items()}
    on_host, accounting = ledger.on_host.most, account.accounting
    forwards = account.forwards if on_host is None else on_host.forwards
    return memory.Rank(
        rank=rank,
        stage=stage,
        share=share,
        stands_for=[rank],
        peak=_peak(account.peak),
        categories={**dict.fromkeys(CATEGORIES, unknown), **own},
        phases=[_phase(each) for each in account.phases],
        traffic=transfers(ledger, nodes or Nodes(None, ledger.device, None)),
        forwards=None if forwards is None else _forwards(forwards),
        on_host=None if on_host is None else _on_host(on_host),
        allocator=memory.Allocator(
            source=accounting.source,
            peak=accounting.peak,
            unattributed=accounting.unattributed,
            foreign=accounting.externally_owned,
            outside=accounting.outside,
            **_reservation(accounting.reservation),
        ),
        unseen=[gap.sentence for gap in ledger.gaps],
    )


def _forwards(forwards: "Forwards") -> memory.Forwards:
    return memory.Forwards(
        alive=forwards.alive,
        bytes=sum(forwards.saved_bytes),
        stashes=list(forwards.saved_bytes),
        where=_place(forwards.where),
    )


def _on_host(most: "MostOnHost") -> memory.OnHost:
    return memory.OnHost(
        activations=most.bytes, pinned=most.pinned, where=memory.Place(**most.where._asdict())
    )


def _reservation(reservation: "Reservation | None") -> dict[str, Any]:
    """The fields of `memory.Allocator` that only a GPU's allocator has."""
    if reservation is None:
        return {}
    missing = reservation.exhausted
    exhausted = missing and memory.Exhausted(
        **missing.where._asdict(), module=missing.module, op=missing.op, bytes=missing.nbytes
    )
    return {**reservation._asdict(), "exhausted": exhausted}


def _peak(peak: "Peak | None") -> memory.Peak:
    if peak is None:
        categories = dict.fromkeys((*CATEGORIES, "kernel"))
        return memory.Peak(
            bytes=None, where=None, categories=categories, saved=None, recomputed=None, holdings=None
        )
    return memory.Peak(
        bytes=peak.bytes,
        allocated=peak.allocated,
        reserved=peak.reserved,
        where=memory.Where(**peak.where._asdict(), module=peak.module, op=peak.op),
        categories=peak.categories,
        saved=peak.saved,
        recomputed=peak.recomputed,
        holdings=[_holding(each) for each in peak.holdings],
    )


def _holding(holding: "Holding") -> memory.Holding:
    """`holding`; without its line, where it has none."""
    line = {"line": holding.line} if holding.line else {}
    return memory.Holding(
        category=holding.category, name=holding.name, bytes=holding.bytes, storages=holding.storages, **line
    )


def _phase(phase: "Phase") -> memory.Phase:
    work = phase.work
    return memory.Phase(
        **phase.where._asdict(),
        peak=phase.peak,
        end=phase.end,
        categories=phase.categories,
        saved=phase.saved,
        recomputed=phase.recomputed,
        flops=None if work is None else work.flops,
        read=None if work is None else work.read,
        written=None if work is None else work.written,
        passes=None if work is None else work.forward_calls,
        work=None if work is None else _by_class(work),
    )


def _by_class(work: "Work") -> dict[str, memory.Work]:
    return {name: memory.Work(**part._asdict()) for name, part in work.by_class.items()}


def failure_record(rank_failure: "failure.Failure", rank: memory.Rank | None = None) -> Failure:
    """The record's `failure`. `rank` has what was allocated then."""
    missing = rank_failure.shortage
    categories = {} if rank is None else {name: each.end for name, each in rank.categories.items()}
    return Failure(
        rank=rank_failure.rank,
        stage=rank_failure.stage,
        where=_place(rank_failure.where),
        error=rank_failure.error,
        shortage=missing and Shortage(**missing._asdict(), categories=categories),
    )


def unfinished(where: "Where | None" = None) -> Failure:
    """The failure of a run that is in `where`, in case it is killed."""
    return Failure(rank=None, where=_place(where), error="the run ended before it could say why")


def _place(where: "Where | None") -> memory.Where | None:
    return None if where is None else memory.Where(**where._asdict())


def write(directory: Path, record: Record) -> None:
    """Write `record` into `directory`, completely or not at all."""
    put(directory / FILE, text(record))


def begin(directory: Path, record: Record) -> bool:
    """Write the first `record` into `directory`, which is then this run's. False: it is another run's."""
    try:
        create(directory / FILE, text(record))
    except FileExistsError:
        return False
    return True


def text(record: Record) -> str:
    """The file of `record`, as JSON."""
    return json.dumps({"schema": SCHEMA, **record.tree()}, indent=1) + "\n"


def without_failure(record: Record) -> str:
    """The file of `record` without its failure, for `with_failure`."""
    tree = {name: value for name, value in record.tree().items() if name != "failure"}
    return json.dumps({"schema": SCHEMA, **tree}, indent=1) + "\n"


def with_failure(rest: str, failure: Failure) -> str:
    """The file of a record with `failure`, where `rest` is the file without it."""
    return rest.removesuffix("\n}\n") + f',\n "failure": {json.dumps(failure.tree())}\n}}\n'


def read(path: str | Path) -> dict[str, Any]:
    """The record in a run's directory, or in a file. Raises ValueError with a sentence if there is none to read."""
    path = as_path(path)
    file = path / FILE if path.is_dir() else path
    if path.is_dir() and file.exists():
        check_inside(path, file)
    return tree(file, SCHEMA, f"{path} contains no {FILE}")


def tree(file: Path, schema: str, absent: str) -> dict[str, Any]:
    """The JSON in `file`, of schema `schema`. Raises ValueError with a sentence: `absent` if there is no file."""
    try:
        if file.exists() and not file.is_file():  # a pipe or a device may never end
            raise ValueError("it is no regular file")
        content = json.loads(file.read_bytes())  # bytes: json accepts a byte order mark in them
    except FileNotFoundError:
        raise ValueError(absent) from None
    except (OSError, ValueError, RecursionError) as error:  # corrupt, not text, or nested too deeply
        raise ValueError(f"{file} cannot be read: {error}") from None
    found_schema = content.get("schema") if isinstance(content, dict) else None
    if found_schema != schema:
        raise ValueError(f"{file} has schema {short_repr(found_schema)}, and this version reads {schema!r}")
    return content  # type: ignore[no-any-return]


def processor() -> str:
    """The processor's name, "" where the system has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
