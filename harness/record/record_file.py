"""What a run leaves on disk: `record.json`, whole at every moment, and `failed` until the run says otherwise."""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.ledger.categories import CATEGORIES

if TYPE_CHECKING:
    from harness.ledger import Forwards, Ledger, Where

SCHEMA = "harness.record/1"
FILE = "record.json"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "hydra-core")


WORK = ("flops", "read", "written", "passes")
"""What a phase did."""


@dataclass(frozen=True)
class Output:
    """What a mode is given to leave its traces with."""

    directory: Path
    say: Callable[[str], None]  # a line to the person, from rank 0
    done: dict[str, Any]  # the record's parts, filled as the run goes, so that a failed run has them too
    flush: Callable[[], None]  # put what is known so far on disk


def head(
    settings: Any, reasons: Mapping[str, str], words: Sequence[str], world: dict[str, Any]
) -> dict[str, Any]:
    """What is known of a run of `settings` before it begins. It has failed until it says that it is complete."""
    return {
        "schema": SCHEMA,
        "status": "failed",
        "mode": settings.mode,
        "world": world,
        "model": {"name": settings.model.name, "parameters": None, "dtype": None},
        "config": asdict(settings),
        "resolved": dict(reasons),
        "environment": environment(words),
    }


def environment(words: Sequence[str] = ()) -> dict[str, Any]:
    """The versions and the machine that made the figures, and the words that asked for them."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
        "command": list(words),
    }


def rank_record(ledger: "Ledger", rank: int, stage: int = 0, share: int = 0) -> dict[str, Any]:
    """One rank's books, in bytes. What was not measured is null."""
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
            "holdings": [_holding(asdict(each)) for each in peak.holdings] if peak else None,
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
    """It without a line where nobody asked for one."""
    return {key: value for key, value in holding.items() if key != "line" or value}


def _forwards(most: "Forwards | None") -> dict[str, Any] | None:
    if most is None:
        return None
    where = _where(most.where) if most.where else None
    return {"alive": most.alive, "bytes": sum(most.stashes), "stashes": list(most.stashes), "where": where}


def _where(where: "Where") -> dict[str, Any]:
    return {"step": where.step, "phase": where.phase, "micro_batch": where.micro_batch}


def write(directory: Path, record: Mapping[str, Any]) -> None:
    """Put `record` in `directory`, whole or not at all."""
    put(directory / FILE, json.dumps(record, indent=1) + "\n")


def put(file: Path, text: str) -> None:
    """Make `file` hold `text`, whole or not at all. Raises OSError."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def read(path: Path) -> dict[str, Any]:
    """The record in a run's directory, or in a file. Raises ValueError with a sentence where there is none to read."""
    return tree(path / FILE if path.is_dir() else path, SCHEMA, f"{path} holds no {FILE}")


def tree(file: Path, schema: str, absent: str) -> dict[str, Any]:
    """The JSON in `file`, which is of `schema`. Raises ValueError with a sentence; `absent` where there is no file."""
    try:
        found = json.loads(file.read_bytes())  # which may begin with a mark
    except FileNotFoundError:
        raise ValueError(absent) from None
    except (OSError, ValueError, RecursionError) as error:  # torn, no text, or nested beyond all bounds
        raise ValueError(f"{file} cannot be read: {error}") from None
    named = found.get("schema") if isinstance(found, dict) else None
    if named != schema:
        raise ValueError(f"{file} has schema {repr(named)[:40]}, and this version reads {schema!r}")
    return found  # type: ignore[no-any-return]


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
