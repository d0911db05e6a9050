"""Prints verdicts: as text, as JSON, as JUnit's XML, and as GitHub's annotations and summary."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from harness.check.tolerance import TRAFFIC
from harness.check.verdict import Change, Verdict
from harness.record.fields import printable
from harness.tables import Table, difference, size

ACCEPT = "if the change is intended, --update makes it the baseline"


def tables(verdict: Verdict) -> Iterator[Table]:
    """One table for each group of ranks that differ from the baseline in the same way."""
    for apart in verdict.apart:
        table = Table(["run"], ["baseline"], ["difference"], [""], ["since"])
        table.section(apart.ranks)
        for change in apart.changes:
            figures = size(change.after), size(change.before), difference(change.before, change.after)
            table.row(f"  {change.name}, {change.figure}", *figures, change.share, change.since)
        yield table


def details(verdict: Verdict) -> Iterator[str]:
    """What the tables do not have, in sentences."""
    for apart in verdict.apart:
        yield from (f"{apart.ranks}: phases that {text}" for text in apart.phases)
        if apart.moved:
            yield f"{apart.ranks}: the peak is in {apart.moved}"
        if apart.holdings:
            named = (f"{_named(each)} {each.sentence()}" for each in apart.holdings)
            yield f"{apart.ranks}: at the peak the furthest from the baseline are {'; '.join(named)}"
        yield from (f"{apart.ranks}: {_moved(each)}" for each in apart.changes if each.figure == TRAFFIC)
    yield from verdict.notes


def _moved(change: Change) -> str:
    """What moved and what did before, to the byte, and what for."""
    before, after = size(change.before, exact=True), size(change.after, exact=True)
    return f"{change.name}: {after}, the baseline's {before}" + f", most for {change.cause}" * bool(
        change.cause
    )


def _named(holding: Change) -> str:
    return f"other {holding.figure}" if holding.name == "others" else holding.name


def text(verdicts: Sequence[Verdict], accept: str = ACCEPT) -> str:
    """A line for each baseline, with the differences below one that does not hold; last, how to `accept` them."""
    longest = max(len(each.name) for each in verdicts)
    width = max(len(each.word) for each in verdicts)
    lines = []
    for each in verdicts:
        parts = [each.headline()] if each.code == 1 else [each.headline(), *each.notes]
        lines.append(f"{each.name:<{longest}}   {each.word:<{width}}   {printable('; '.join(parts))}")
        if each.code == 1:
            body = [*(line for table in tables(each) for line in table.text().splitlines()), *details(each)]
            lines += [f"  {printable(line)}" for line in body]
    if any(each.code == 1 for each in verdicts):
        lines.append(accept)
    return "\n".join(lines)


def summary(verdicts: Sequence[Verdict]) -> str:
    """One line: how many verdicts there are of each kind."""
    verdict_words = [each.word for each in verdicts]
    verbs = {"NO": "do not hold", "holds": "hold"}
    counts = (f"{verdict_words.count(word)} {verbs.get(word, word)}" for word in dict.fromkeys(verdict_words))
    return f"{len(verdict_words)} baselines: {', '.join(counts)}"


def data(verdict: Verdict) -> dict[str, Any]:
    """A verdict for `--json`, in bytes."""
    return {
        "baseline": str(verdict.file),
        "verdict": ("holds", "does not hold", "not checked", "not checked")[verdict.code],
        "written": verdict.written or None,
        "failure": verdict.failure or None,
        "ranks": [
            {
                "ranks": apart.ranks.partition(" ")[2],
                "changes": [each._asdict() for each in apart.changes],
                "phases": list(apart.phases),
                "holdings": [
                    {"category": each.figure, "name": each.name, "before": each.before, "after": each.after}
                    for each in apart.holdings
                ],
            }
            for apart in verdict.apart
        ],
        "notes": list(verdict.notes),
        "seconds": verdict.seconds,
    }


def junit(verdicts: Sequence[Verdict]) -> str:
    """JUnit's XML: a case for each baseline, with a failure if it does not hold, and an error if it was not checked."""
    failures, errors = (sum(each.code in codes for each in verdicts) for codes in ((1,), (2, 3)))
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": str(errors)}
    suite = ElementTree.Element("testsuite", {"name": "harness check", **counts})
    for each in verdicts:
        time = {} if each.seconds is None else {"time": f"{each.seconds:.3f}"}
        attributes = {"classname": "harness.check", "name": each.name, **time}
        case = ElementTree.SubElement(suite, "testcase", attributes)
        if each.code:
            kind, line = "failure" if each.code == 1 else "error", printable(each.headline())
            ElementTree.SubElement(case, kind, {"message": line}).text = text([each])
    suites = ElementTree.Element("testsuites", counts)
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, "unicode", xml_declaration=True) + "\n"


def annotations(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """GitHub's workflow commands: an error for each baseline that does not hold or was not checked; else one notice."""
    for each in verdicts:
        if each.code:
            message = "\n".join(printable(line) for line in (each.headline(), *details(each)))
            file, title = _escaped(str(each.file), within=True), _escaped(each.name, within=True)
            yield f"::error file={file},title={title}::{_escaped(message)}"
    if not any(each.code for each in verdicts):
        yield f"::notice title=harness check::{_escaped(summary(verdicts))}"


def _escaped(text: str, within: bool = False) -> str:
    """`text` escaped for a workflow command: for its message, or with `within` for the value of a property."""
    for character in "%\r\n" + (":," if within else ""):
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The summary as Markdown: a row for each baseline, then the differences."""
    table = Table(["verdict"], ["what"])
    for each in verdicts:
        table.row(each.name, each.word, printable(each.headline()))
    parts = [f"### Memory: {summary(verdicts)}", table.markdown()]
    for each in verdicts:
        if each.code == 1:
            parts += [f"#### {_without_markup(each.name)}", *(table.markdown() for table in tables(each))]
            parts += [f"- {_without_markup(line)}" for line in details(each)]
    return "\n\n".join(parts) + "\n\n"


def _without_markup(line: str) -> str:
    """`line` with Markdown's special characters escaped."""
    return "".join(f"\\{each}" if each in "\\`*_<>[]|#" else each for each in printable(line))


def to_github(verdicts: Sequence[Verdict], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Append the summary to the file in GITHUB_STEP_SUMMARY, and return the annotations to print. Raises ValueError."""
    page = environment.get("GITHUB_STEP_SUMMARY")
    if page:
        try:
            with Path(page).open("a", encoding="utf-8") as stream:
                stream.write(markdown(verdicts))
        except OSError as error:
            raise ValueError(f"GITHUB_STEP_SUMMARY={page}: it cannot be written: {error.strerror}") from None
    return [*annotations(verdicts)] if environment.get("GITHUB_ACTIONS") == "true" else []
