"""`harness verify`: real runs on this machine beside their rehearsals, figure by figure, and the file that says so.

`CASES` are the runs. Real ones are processes of their own, as a user starts them, and all come before the rehearsals.
Start at `main`; `machine.py` says where it runs, `verify_page.py` shows the figures, `record/verified.py` keeps them.
"""

import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from harness.analysis.args import Parser, refuse
from harness.analysis.speed.roofline_model import bounds
from harness.check import machine, verify_page
from harness.config import compose
from harness.config.load import load
from harness.config.settings import Refusal
from harness.ledger.categories import CATEGORIES, KERNEL
from harness.record import record_file, verified
from harness.record.fields import printable
from harness.record.schema import Record, parse
from harness.record.verified import Figure, Pair, Verified
from harness.runtime import tracebacks
from harness.runtime.files import put
from harness.tables import seconds

_MODEL = ("model=tiny", "precision=bf16")
_TRAIN = (
    *("mode=train", *_MODEL, "train.steps=2", "train.sequence=128", "train.micro_batch=4"),
    *("train.validate_every=0", "train.export=false"),
)
_INFER = (
    *("mode=infer", *_MODEL, "generation.batch=2", "generation.count=6", "generation.prompt_length=32"),
    *("generation.max_new_tokens=8", "generation.stop_at_eos=false", "ledger.steps=1"),
)
"""Only the first batch is exact, and the others are timed, for the decode's MBU."""
_COMPILED = ("parameters", "kv_cache")


@dataclass(frozen=True)
class Case:
    """A run and its rehearsal. `judged` are the categories that must agree; None: every figure."""

    name: str
    config: tuple[str, ...]
    gpu: bool = False  # only on a GPU
    quick: bool = False
    judged: tuple[str, ...] | None = None
    real_only: tuple[str, ...] = ()  # overrides that a rehearsal refuses
    leaves: str = ""  # a file that the real run must leave


CASES = (
    Case("train-zero0", (*_TRAIN, "zero=0"), quick=True),
    Case("train-zero1", (*_TRAIN, "zero=1")),
    Case("train-zero2", (*_TRAIN, "zero=2")),
    Case("train-zero3", (*_TRAIN, "zero=3")),
    Case("train-checkpointing-full", (*_TRAIN, "zero=1", "checkpointing=full")),
    Case("train-checkpointing-selective", (*_TRAIN, "zero=1", "checkpointing=selective")),
    Case("train-offload", (*_TRAIN, "zero=3", "checkpointing.offload=cpu"), gpu=True),
    Case(
        "train-offload-full",
        (*_TRAIN, "zero=1", "checkpointing=full", "checkpointing.offload=cpu"),
        gpu=True,
    ),
    Case(
        "train-snapshot",
        (*_TRAIN, "zero=0"),
        gpu=True,
        real_only=("ledger.snapshot=true",),
        leaves="snapshot-0.pickle",
    ),
    Case("infer-dynamic", (*_INFER, "generation.cache=dynamic"), quick=True),
    Case("infer-static", (*_INFER, "generation.cache=static")),
    Case(
        "infer-paged",
        (*_INFER, "generation.cache=paged", "generation.batching=continuous", "generation.lengths=skewed"),
    ),
    Case("infer-offloaded", (*_INFER, "generation.cache=offloaded"), gpu=True),
    Case("infer-none", (*_INFER, "generation.cache=none")),
    Case(
        "infer-compiled",
        (*_INFER, "generation.cache=static", "generation.compile=true"),
        gpu=True,
        judged=_COMPILED,
    ),
)
"""`infer-compiled` captures CUDA graphs; a rehearsal compiles nothing, so only what stays is judged."""


class Failed(RuntimeError):
    """A run or a rehearsal failed; the message says which."""


class Run(NamedTuple):
    """A record, and the seconds that it took."""

    record: Record
    seconds: float


def main(argv: Sequence[str]) -> int:
    """`harness verify`. Exit code: 0 all equal, 1 a figure differs, 2 a wrong request, 3 a run failed."""
    try:
        options = _parser().parse_args(argv)
        here = machine.here(options.hardware)
        cases = _cases(options, here.device)
        _writable(options.out)
        if here.note:
            print(f"harness: {here.note}", file=sys.stderr)
        result = _verified(here, cases, len(cases) == len(_cases(None, here.device)))
        _write(options.out, here, result)
    except ValueError as error:
        return refuse(error)
    except Failed as error:
        print(f"harness: {printable(str(error))}", file=sys.stderr)
        return 3
    print(verified.text(result) if options.json else verify_page.text(result))
    return int(any(pair.apart for pair in result.pairs))


def _parser() -> Parser:
    parser = Parser(
        "verify",
        description="Run small configs on this machine, rehearse each for it, and compare every figure.",
        epilog="Exit code 0: all are equal. 1: a figure differs. 2: a wrong request. 3: a run failed.",
    )
    names = ", ".join(case.name for case in CASES)
    parser.add_argument("--only", metavar="NAME", help=f"only these, with commas between: {names}")
    parser.add_argument("--quick", action="store_true", help="only one run of each mode")
    parser.takes_place("--out", default=verified.DIRECTORY, metavar="DIR", help="where files go")
    parser.add_argument(
        "--hardware", metavar="NAME", help="the page in conf/hardware, if the GPU's name has none"
    )
    parser.add_argument("--json", action="store_true", help="what the file has")
    return parser


def _cases(options: Namespace | None, device: str) -> list[Case]:
    """The cases that the options name, of those for this device. Raises ValueError."""
    cases = [case for case in CASES if device == "cuda" or not case.gpu]
    if options is None or not (options.only or options.quick):
        return cases
    if options.quick and options.only:
        raise ValueError("verify: give either --quick or --only")
    if options.quick:
        return [case for case in cases if case.quick]
    by_name = {case.name: case for case in cases}
    names = options.only.split(",")
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"verify: --only {unknown[0]}: on this device there are {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)]


def _writable(directory: Path) -> None:
    """Make `directory`. Raises ValueError where nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {directory}: it cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"--out {directory}: there is no permission to write there")


def _verified(here: machine.Machine, cases: Sequence[Case], complete: bool) -> Verified:
    reals = [_say(case.name, "run", _real(case)) for case in cases]
    rehearsals = [_say(case.name, "rehearsed", _rehearsed(case, here.page)) for case in cases]
    made_by = reals[0].record.environment
    return Verified(
        hardware=here.name,
        device=here.device,
        device_name=here.device_name,
        driver=here.driver,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        python=made_by.python or "",
        platform=made_by.platform or "",
        packages=made_by.packages,
        complete=complete,
        pairs=[_pair(*each) for each in zip(cases, reals, rehearsals, strict=True)],
    )


def _say(name: str, done: str, run: Run) -> Run:
    print(f"{name}: {done} in {seconds(run.seconds)}", file=sys.stderr, flush=True)
    return run


def _real(case: Case) -> Run:
    """A run in a process of its own. Raises Failed."""
    with TemporaryDirectory(prefix="harness-verify-") as place:
        directory = Path(place) / "run"
        words = [*case.config, *case.real_only, f"hydra.run.dir={directory}"]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "harness", *words], capture_output=True, text=True, check=False
        )
        took = time.monotonic() - began
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise Failed(f"{case.name}: the run ended with {done.returncode}: {last}")
        if case.leaves and not (directory / case.leaves).exists():
            raise Failed(f"{case.name}: the run left no {case.leaves}")
        return Run(parse(record_file.read(directory), case.name), took)


def _rehearsed(case: Case, page: str) -> Run:
    """Its rehearsal, in this process. Raises Failed."""
    from harness.rehearsal.all_ranks import rehearsed  # imports torch

    words, began = [*case.config, "world=rehearsed", "world.size=1", f"hardware={page}"], time.monotonic()
    try:
        record = rehearsed(load(compose.compose(words)), words, parallel=False)
    except Refusal as refusal:
        raise Failed(f"{case.name}: its rehearsal is refused: {refusal}") from refusal
    except Exception as error:  # whatever the rehearsed code raises
        raise Failed(f"{case.name}: its rehearsal failed: {tracebacks.sentence(error)}") from error
    return Run(record, time.monotonic() - began)


def _pair(case: Case, real: Run, rehearsed: Run) -> Pair:
    decode = (bound.mbu for bound in bounds(real.record) if bound.phase == "decode")
    return Pair(
        name=case.name,
        config=[*case.config, *case.real_only],
        figures=[*figures(real.record, rehearsed.record, case.judged)],
        real_seconds=round(real.seconds, 1),
        rehearsed_seconds=round(rehearsed.seconds, 1),
        mbu=next(decode, None),
        unseen=real.record.worst.unseen,
    )


def figures(real: Record, rehearsed: Record, judged: Sequence[str] | None = None) -> Iterator[Figure]:
    """Every figure of the two worst ranks, in bytes. With `judged`, only those of these categories must agree.

    The peak is that of the allocator, and judged where both know what kernels take.
    """
    ours, theirs = real.worst, rehearsed.worst
    kernels = None not in (ours.peak.categories.get(KERNEL), theirs.peak.categories.get(KERNEL))
    everything = judged is None
    yield Figure(
        name="peak", real=ours.peak.bytes, rehearsed=theirs.peak.bytes, judged=everything and kernels
    )
    for name in ("allocated", "reserved"):
        pair = getattr(ours.peak, name), getattr(theirs.peak, name)
        yield Figure(name=name, real=pair[0], rehearsed=pair[1], judged=everything)
    for name in ("slack", "outside"):
        pair = getattr(ours.allocator, name), getattr(theirs.allocator, name)
        yield Figure(name=name, real=pair[0], rehearsed=pair[1], judged=False)
    for name in CATEGORIES:
        before, after = ours.categories[name], theirs.categories[name]
        agrees = everything or name in (judged or ())
        yield Figure(name=f"{name}, peak", real=before.peak, rehearsed=after.peak, judged=agrees)
        yield Figure(name=f"{name}, end", real=before.end, rehearsed=after.end, judged=agrees)
    kernel = ours.peak.categories.get(KERNEL), theirs.peak.categories.get(KERNEL)
    yield Figure(
        name="kernel, at the peak", real=kernel[0], rehearsed=kernel[1], judged=everything and kernels
    )
    unattributed = ours.allocator.unattributed
    yield Figure(name="unattributed", real=unattributed, rehearsed=0, judged=everything)
    if ours.on_host is not None and theirs.on_host is not None:
        for name in ("activations", "pinned"):
            waiting = getattr(ours.on_host, name), getattr(theirs.on_host, name)
            yield Figure(name=f"{name} on the host", real=waiting[0], rehearsed=waiting[1], judged=everything)
    for name in ("kv_reserved", "kv_filled", "kv_host"):
        cache = getattr(real.inference, name), getattr(rehearsed.inference, name)
        yield Figure(
            name=name, real=cache[0], rehearsed=cache[1], judged=everything or "kv_cache" in (judged or ())
        )


def _write(directory: Path, here: machine.Machine, result: Verified) -> None:
    """Write the file and the page. Raises ValueError."""
    try:
        put(directory / f"{result.hardware}.json", verified.text(result))
        put(directory / f"{result.hardware}.md", verify_page.page(result, here.note))
    except OSError as error:
        raise ValueError(f"--out {directory}: it cannot be written: {error.strerror}") from None
