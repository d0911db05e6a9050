"""`record.json` of a run. The file is complete at every moment, and `failed` until the run has finished."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.ledger.categories import CATEGORIES
from harness.runtime.files import put

if TYPE_CHECKING:
    from harness.ledger import Forwards, Ledger, Where

SCHEMA = "harness.record/1"
FILE = "record.json"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "hydra-core")


WORK = ("flops", "read", "written", "passes")
"""The record keys of a phase's work."""


@dataclass(frozen=True)
class Output:
    """What a mode uses to write its output."""

    directory: Path
    say: Callable[[str], None]  # prints a line, on rank 0
    done: dict[str, Any]  # parts of the record, filled during the run, so that a failed run has them too
    flush: Callable[[], None]  # write the record so far to disk


def head(
    settings: Any, reasons: Mapping[str, str], command: Sequence[str], world: dict[str, Any]
) -> dict[str, Any]:
    """The record of a run of `settings` before it begins. Its status is `failed` until the run is complete."""
    return {
        "schema": SCHEMA,
        "status": "failed",
        "mode": settings.mode,
        "world": world,
        "model": {"name": settings.model.name, "parameters": None, "dtype": None},
        "config": asdict(settings),
        "resolved": dict(reasons),
        "environment": environment(command),
    }


def environment(command: Sequence[str] = ()) -> dict[str, Any]:
    """The versions and the machine of the run, and its command line."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
        "command": list(command),
    }


def rank_record(ledger: "Ledger", rank: int, stage: int = 0, share: int = 0) -> dict[str, Any]:
    """The record of one rank, in bytes. What was not measured is null."""
    account = ledger.account()
    peak = account.peak
    return {
        "rank": rank,
        "stage": stage,
        "share": share,
        "stands_for": [rank],
        "peak": {
            "bytes": peak.bytes if peak else None,
            "where": {**_where(peak.where), "module": peak.module, "op": peak.op} if peak else None,
            "categories": dict(peak.categories) if peak else dict.fromkeys((*CATEGORIES, "kernel")),
            "saved": peak.saved if peak else None,
            "recomputed": peak.recomputed if peak else None,
            "holdings": [_holding(asdict(holding)) for holding in peak.holdings] if peak else None,
        },
        "categories": {
            name: asdict(account.categories[name])
            if name in account.categories
            else {"peak": None, "end": None}
            for name in CATEGORIES
        },
        "phases": [
            {
                **_where(phase.where),
                "peak": phase.peak,
                "end": phase.end,
                "categories": phase.categories,
                "saved": phase.saved,
                "recomputed": phase.recomputed,
                **(phase.work._asdict() if phase.work else dict.fromkeys(WORK)),
            }
            for phase in account.phases
        ],
        "forwards": _forwards(account.forwards),
        "allocator": asdict(account.books),
        "unseen": [gap.sentence for gap in ledger.gaps],
    }


def _holding(holding: dict[str, Any]) -> dict[str, Any]:
    """`holding` without an empty line."""
    return {key: value for key, value in holding.items() if key != "line" or value}


def _forwards(forwards: "Forwards | None") -> dict[str, Any] | None:
    if forwards is None:
        return None
    where = _where(forwards.where) if forwards.where else None
    return {
        "alive": forwards.alive,
        "bytes": sum(forwards.stashes),
        "stashes": list(forwards.stashes),
        "where": where,
    }


def _where(where: "Where") -> dict[str, Any]:
    return {"step": where.step, "phase": where.phase, "micro_batch": where.micro_batch}


def write(directory: Path, record: Mapping[str, Any]) -> None:
    """Write `record` into `directory`, completely or not at all."""
    put(directory / FILE, json.dumps(record, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The record in a run's directory, or in a file. Raises ValueError with a sentence if there is none to read."""
    return tree(path / FILE if path.is_dir() else path, SCHEMA, f"{path} holds no {FILE}")


def tree(file: Path, schema: str, absent: str) -> dict[str, Any]:
    """The JSON in `file`, of schema `schema`. Raises ValueError with a sentence: `absent` if there is no file."""
    try:
        content = json.loads(file.read_bytes())  # bytes: json accepts a byte order mark in them
    except FileNotFoundError:
        raise ValueError(absent) from None
    except (OSError, ValueError, RecursionError) as error:  # corrupt, not text, or nested too deeply
        raise ValueError(f"{file} cannot be read: {error}") from None
    found_schema = content.get("schema") if isinstance(content, dict) else None
    if found_schema != schema:
        raise ValueError(f"{file} has schema {repr(found_schema)[:40]}, and this version reads {schema!r}")
    return content  # type: ignore[no-any-return]


def _processor() -> str:
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
