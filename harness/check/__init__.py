"""`harness check`: compares the memory of a run, or of a rehearsal of a baseline's config, with the baseline, in bytes.

It may import all that is below it. Start at `main` here; `verdict.py` compares, `announce.py` prints, `budget.py`
serves the pytest plugin. `verify.py` is `harness verify`: real runs beside their rehearsals.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from harness.analysis.args import Parser, refuse
from harness.check import announce, baseline
from harness.check.tolerance import tolerances
from harness.check.verdict import Verdict, judge
from harness.config.refusal import Refusal
from harness.record import record_file
from harness.record.fields import printable
from harness.record.schema import Record, parse
from harness.runtime import tracebacks
from harness.runtime.files import put
from harness.runtime.progress import Pace, aside

OPTION = "--tolerance "
EMPTY = "it has no baseline; RUN --baseline FILE --update makes one"


def main(argv: Sequence[str]) -> int:
    """`harness check`. Exit code: 0 all hold, 1 one does not, 2 one was not checked, 3 a rehearsal failed."""
    try:
        options = _parser().parse_args(argv)
        files, amounts = _files(options), dict(map(_pair, options.tolerance))
        tolerances(amounts, OPTION)
        verdicts = [*(_of_run if options.run else _rehearsed)(options, files, amounts)]
        _report(options, sorted(verdicts, key=lambda each: each.file))
    except ValueError as error:
        return refuse(error)
    return max(each.code for each in verdicts)


def _parser() -> Parser:
    parser = Parser(
        "check",
        description="Compare a run with a baseline, category by category, rank by rank and phase by phase.",
        usage="harness check [RUN] --baseline FILE | harness check --all    [--update] [--tolerance NAME=AMOUNT]",
        epilog="Exit code 0: all hold. 1: a figure differs. 2: there is nothing to compare, or it cannot be compared. "
        "3: a rehearsal failed.",
    )
    parser.takes_runs("?", "; without one, the baseline's config is rehearsed")
    parser.takes_place("--baseline", metavar="FILE", help="the baseline to compare with")
    parser.add_argument("--all", action="store_true", help="rehearse and check every baseline")
    parser.takes_place(
        "--profiles", default=Path("profiles"), metavar="DIR", help="the directory that --all reads"
    )
    parser.add_argument("--update", action="store_true", help="write what was measured as the baseline")
    more = "let a category differ by this, as activations=1%% or workspace=64KiB; with --update it is kept in the file"
    parser.add_argument("--tolerance", action="append", default=[], metavar="NAME=AMOUNT", help=more)
    parser.takes_place("--junit", metavar="FILE", help="write JUnit's XML, a case for each baseline")
    parser.add_argument("--json", action="store_true", help="every difference, in bytes")
    return parser


def _files(options: Namespace) -> list[Path]:
    """The files of the baselines that the options select. Raises ValueError."""
    if bool(options.baseline) == options.all:
        raise ValueError("check: give either --baseline FILE or --all")
    if options.baseline:
        return [options.baseline]
    if options.run:
        raise ValueError(
            f"check {options.run}: --all rehearses and takes no run; compare a run with --baseline FILE"
        )
    files = sorted(options.profiles.glob("*.json"))
    if not files:
        raise ValueError(f"--profiles {options.profiles}: {EMPTY}")
    return files


def _pair(text: str) -> tuple[str, str]:
    name, equals, amount = text.partition("=")
    if not equals:
        raise ValueError(f"{OPTION}{text}: give a category and how much it may differ, as activations=1%")
    return name, amount


def _of_run(options: Namespace, files: Sequence[Path], amounts: Mapping[str, str]) -> Iterator[Verdict]:
    tree, source = record_file.read(options.run), str(options.run)
    try:
        record = parse(tree, source)
    except ValueError as error:
        yield Verdict(files[0], failure=str(error))
    else:
        yield _settled(files[0], record, source, options.update, amounts)


def _settled(file: Path, run: Record, source: str, update: bool, amounts: Mapping[str, str]) -> Verdict:
    """The verdict on `run`: compare it with the baseline in `file`, or with `update` write it there."""
    try:
        measured = baseline.of(run, source)
        if update:
            return Verdict(file, str(file), written=baseline.update(file, measured, amounts))
        expected = baseline.read(file)
        tolerance = tolerances({**expected.tolerance, **amounts}, OPTION)
        return judge(file, expected, measured, run.config, tolerance)
    except ValueError as error:
        return Verdict(file, failure=str(error))
    except Refusal as refusal:  # the baseline's overrides are no valid config any more
        return Verdict(file, failure=f"{file}: config: {refusal}")


def _rehearsed(options: Namespace, files: Sequence[Path], amounts: Mapping[str, str]) -> Iterator[Verdict]:
    """The verdict on each baseline as soon as its rehearsal ends. Several run in parallel, with a progress bar."""
    baselines: dict[Path, baseline.Baseline] = {}
    for file in files:
        try:
            expected = baseline.read(file)
            if expected.mode == baseline.TEST:
                raise ValueError(f"{file}: it belongs to a test; pytest checks it, --memory-update writes it")
            baselines[file] = expected
        except ValueError as error:
            yield Verdict(file, failure=str(error))

    def verdict_of(file: Path, result: Record | str | Crashed, seconds: float) -> Verdict:
        if isinstance(result, str):
            return Verdict(file, failure=f"{file}: {result}", seconds=seconds)
        if isinstance(result, Crashed):
            return Verdict(
                file, failure=f"{file}: its rehearsal failed: {result.error}", crashed=True, seconds=seconds
            )
        return replace(_settled(file, result, str(file), options.update, amounts), seconds=seconds)

    if len(files) == 1:
        yield from (verdict_of(file, *_rehearse(each.config, each.world)) for file, each in baselines.items())
        return
    from harness.rehearsal.pool import workers

    with (
        workers() as pool,
        Pace(len(baselines), "baseline", aside) as pace,
    ):
        running = {
            pool.submit(_rehearse, each.config, each.world, False): file for file, each in baselines.items()
        }
        for done in as_completed(running):
            pace.advance()
            yield verdict_of(running[done], *done.result())


@dataclass(frozen=True)
class Crashed:
    """A rehearsal failed with an error that no wrong request explains."""

    error: str


def _rehearse(
    overrides: Sequence[str], size: int, parallel: bool = True
) -> tuple[Record | str | Crashed, float]:
    """The record of a rehearsal of `overrides` on `size` ranks, or why it is refused, or how it failed; its seconds."""
    from harness.config import compose
    from harness.config.load import load
    from harness.config.rules import check_world

    start = time.monotonic()
    try:
        settings = load(compose.compose([*overrides, "world=rehearsed", f"world.size={size}"]))
        check_world(settings, size)
        from harness.rehearsal.all_ranks import rehearsed  # imports torch

        return rehearsed(settings, overrides, parallel), time.monotonic() - start
    except Refusal as refusal:
        return str(refusal), time.monotonic() - start
    except Exception as error:
        # any class: it may have to cross a process, and the other baselines are still to check
        return Crashed(tracebacks.sentence(error)), time.monotonic() - start


def _report(options: Namespace, verdicts: Sequence[Verdict]) -> None:
    """Print the verdicts, annotate GitHub and write JUnit's file. Raises ValueError where a file cannot be written."""
    if options.json:
        print(json.dumps({"baselines": [announce.data(each) for each in verdicts]}, indent=1))
    else:
        if checked := [each for each in verdicts if not each.failure]:
            print(announce.text(checked))
        if options.all:
            print(announce.summary(verdicts))
    for each in verdicts:
        if each.failure:
            print(f"harness: {printable(each.failure)}", file=sys.stderr)
    for line in announce.to_github(verdicts):
        print(line, file=sys.stderr if options.json else sys.stdout)
    if options.junit:
        try:
            options.junit.parent.mkdir(parents=True, exist_ok=True)
            put(options.junit, announce.junit(verdicts))
        except OSError as error:
            raise ValueError(f"--junit {options.junit}: it cannot be written: {error.strerror}") from None
