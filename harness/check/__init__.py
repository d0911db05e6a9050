"""`harness check`: a run, or a rehearsal of a baseline's own config, must hold what the baseline says, to the byte.

It may import all that is below it. Start at `main` here; `verdict.py` compares, `announce.py` prints, `budget.py`
is pytest's side.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.analysis.args import Parser
from harness.check import announce, baseline
from harness.check.tolerance import tolerances
from harness.check.verdict import Verdict, judge
from harness.config import compose
from harness.config.load import load
from harness.config.rules import check_world
from harness.config.settings import Refusal
from harness.record import record_file
from harness.record.schema import parse, printable
from harness.runtime.progress import Pace, aside

SAID = "--tolerance "
EMPTY = "it has no baseline; RUN --baseline FILE --update makes one"


def main(argv: Sequence[str]) -> int:
    """`harness check`; the exit code: 0 every baseline holds, 1 one does not, 2 that cannot be said."""
    try:
        asked = _parser().parse_args(argv)
        files, given = _files(asked), dict(map(_pair, asked.tolerance))
        tolerances(given, SAID)
        verdicts = [*(_of_run if asked.run else _rehearsed)(asked, files, given)]
        _report(asked, sorted(verdicts, key=lambda each: each.file))
    except ValueError as error:
        print(f"harness: {printable(str(error))}", file=sys.stderr)
        return 2
    return max(each.code for each in verdicts)


def _parser() -> Parser:
    parser = Parser(
        "check",
        description="Hold a run against a baseline, category by category, rank by rank and phase by phase.",
        usage="harness check [RUN] --baseline FILE | harness check --all    [--update] [--tolerance NAME=AMOUNT]",
        epilog="Exit code 0: all hold. 1: a figure is another. 2: there is nothing to compare, or it does not compare.",
    )
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="a run; none rehearses the baseline's config"
    )
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="what it is held against")
    parser.add_argument("--all", action="store_true", help="rehearse and check every baseline there is")
    parser.add_argument(
        "--profiles", type=Path, default=Path("profiles"), metavar="DIR", help="where --all finds them"
    )
    parser.add_argument("--update", action="store_true", help="write what was measured as the baseline")
    more = "let a category be so far off, as activations=1%% or workspace=64KiB; with --update it is kept in the file"
    parser.add_argument("--tolerance", action="append", default=[], metavar="NAME=AMOUNT", help=more)
    parser.add_argument(
        "--junit", type=Path, metavar="FILE", help="write JUnit's XML, a case for each baseline"
    )
    parser.add_argument("--json", action="store_true", help="every difference, in bytes")
    return parser


def _files(asked: Namespace) -> list[Path]:
    """The baselines that were asked for. Raises ValueError."""
    if bool(asked.baseline) == asked.all:
        raise ValueError("check: give either --baseline FILE or --all")
    if asked.baseline:
        return [asked.baseline]
    if asked.run:
        raise ValueError(f"check {asked.run}: --all rehearses; hold a run against one, with --baseline FILE")
    found = sorted(asked.profiles.glob("*.json"))
    if not found:
        raise ValueError(f"--profiles {asked.profiles}: {EMPTY}")
    return found


def _pair(text: str) -> tuple[str, str]:
    name, equals, amount = text.partition("=")
    if not equals:
        raise ValueError(f"{SAID}{text}: give a category and how far it may be off, as activations=1%")
    return name, amount


def _of_run(asked: Namespace, files: Sequence[Path], given: Mapping[str, str]) -> Iterator[Verdict]:
    yield _settled(files[0], record_file.read(asked.run), str(asked.run), asked.update, given)


def _settled(
    file: Path, run: Mapping[str, Any], source: str, update: bool, given: Mapping[str, str]
) -> Verdict:
    """What came of the record `run`: held against the baseline in `file`, or put there."""
    try:
        parsed = parse(run, source)
        held = baseline.of(parsed, source)
        if update:
            return Verdict(file, str(file), written=baseline.update(file, held, given))
        expected = baseline.read(file)
        allowed = tolerances({**expected.tolerance, **given}, SAID)
        return judge(file, expected, held, parsed.config, allowed)
    except ValueError as error:
        return Verdict(file, failure=str(error))
    except Refusal as refusal:  # the words of a config that was
        return Verdict(file, failure=f"{file}: config: {refusal}")


def _rehearsed(asked: Namespace, files: Sequence[Path], given: Mapping[str, str]) -> Iterator[Verdict]:
    """Each baseline as its rehearsal is done; several at a time, with a progress bar, where there are several."""
    wanted: dict[Path, baseline.Baseline] = {}
    for file in files:
        try:
            found = baseline.read(file)
            if found.mode == baseline.TEST:
                raise ValueError(
                    f"{file}: it is a test's; pytest holds the test to it, --memory-update writes it"
                )
            wanted[file] = found
        except ValueError as error:
            yield Verdict(file, failure=str(error))

    def settled(file: Path, found: Mapping[str, Any] | str, seconds: float) -> Verdict:
        if isinstance(found, str):
            return Verdict(file, failure=f"{file}: {found}", seconds=seconds)
        return replace(_settled(file, found, str(file), asked.update, given), seconds=seconds)

    if len(files) == 1:
        yield from (settled(file, *_rehearse(each.config, each.world)) for file, each in wanted.items())
        return
    from harness.rehearsal.pool import workers

    with (
        workers(len(wanted)) as pool,
        Pace(len(wanted), "baseline", aside) as pace,
    ):
        running = {
            pool.submit(_rehearse, each.config, each.world, False): file for file, each in wanted.items()
        }
        for done in as_completed(running):
            pace.advance()
            yield settled(running[done], *done.result())


def _rehearse(words: Sequence[str], size: int, parallel: bool = True) -> tuple[dict[str, Any] | str, float]:
    """The record of a rehearsal of `words` on `size` ranks, or why there is none; and the seconds that took."""
    began = time.monotonic()
    try:
        settings = load(compose.compose([*words, "world=rehearsed", f"world.size={size}"]))
        check_world(settings, size)
        from harness.rehearsal.all_ranks import rehearsed  # torch comes in here

        return rehearsed(settings, words, parallel), time.monotonic() - began
    except Refusal as refusal:
        return str(refusal), time.monotonic() - began
    except Exception as error:  # of whatever class: another process asked, or there are others to check
        told = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return f"its rehearsal failed: {told}", time.monotonic() - began


def _report(asked: Namespace, verdicts: Sequence[Verdict]) -> None:
    """Say what came of them, wherever somebody listens. Raises ValueError where a file cannot be written."""
    if asked.json:
        print(json.dumps({"baselines": [announce.data(each) for each in verdicts]}, indent=1))
    else:
        if checked := [each for each in verdicts if not each.failure]:
            print(announce.text(checked))
        if asked.all:
            print(announce.summary(verdicts))
    for each in verdicts:
        if each.failure:
            print(f"harness: {printable(each.failure)}", file=sys.stderr)
    for line in announce.to_github(verdicts):
        print(line, file=sys.stderr if asked.json else sys.stdout)
    if asked.junit:
        try:
            asked.junit.parent.mkdir(parents=True, exist_ok=True)
            record_file.put(asked.junit, announce.junit(verdicts))
        except OSError as error:
            raise ValueError(f"--junit {asked.junit}: it cannot be written: {error.strerror}") from None
